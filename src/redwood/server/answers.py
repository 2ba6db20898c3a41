"""Response bodies of OpenAI's API: whole, in chunks, with log-probabilities and usage."""

from __future__ import annotations

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from redwood.server.errors import ApiError
from redwood.server.generation import Choice, Event
from redwood.server.schema import StreamOptions
from redwood.server.streaming import DONE
from redwood.server.streaming import event as encoded_event
from redwood.server.tokens import TokenTexts
from redwood.server.tools.gathering import CallIds, finish_reason, gathered
from redwood.server.tools.parts import (
    CallArguments,
    CallEnd,
    CallStart,
    Malformed,
    Part,
    Reasoning,
    Text,
)

_LOWEST_LOGPROB = -9999.0  # JSON has no minus infinity; OpenAI and vLLM use this number


class Answer(ABC):
    """Builds the bodies of one answer; the subclasses build the choices in them.

    Args:
        model: the name that the request used.
        texts: texts of tokens, for log-probabilities.
        fingerprint: `system_fingerprint`: identifies version and model.
    """

    prefix: str
    object: str
    chunk_object: str

    def __init__(
        self, model: str, texts: TokenTexts, fingerprint: str, options: StreamOptions
    ) -> None:
        self._texts, self._options = texts, options
        self._ids = CallIds()
        self._head = {
            "id": f"{self.prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": fingerprint,
        }

    def whole(
        self,
        events: Sequence[Sequence[Event]],
        parts: Sequence[Sequence[Part]],
        usage: dict[str, Any],
    ) -> dict[str, Any]:
        """Returns the answer from the events of each choice, and the parts of their texts."""
        choices = [
            {
                "index": index,
                **self._said(said),
                "logprobs": self._logprobs(those, 0),
                "finish_reason": finish_reason(those[-1].finish_reason, said),
            }
            for index, (those, said) in enumerate(zip(events, parts, strict=True))
        ]
        return {**self._head, "object": self.object, "choices": choices, "usage": usage}

    def chunks(
        self, event: Event, parts: Sequence[Part], *, offset: int = 0, called: bool = False
    ) -> list[dict[str, Any]]:
        """Returns the chunks of one event.

        Args:
            parts: of its text.
            offset: characters of the choice before it.
            called: whether the choice has a whole call, with this event.
        """
        deltas = self._added(parts, event.choice) or [self._added_nothing()]
        if len(deltas) == 1 and not (parts or event.logprobs or event.finish_reason or event.trace):
            return []
        made = []
        for number, delta in enumerate(deltas):
            last = number == len(deltas) - 1
            reason = "tool_calls" if called and event.finish_reason == "stop" else None
            choice = {
                "index": event.choice,
                **delta,
                "logprobs": self._logprobs([event], offset) if number == 0 else None,
                "finish_reason": (reason or event.finish_reason) if last else None,
            }
            made.append({**self._head, "object": self.chunk_object, "choices": [choice]})
        return made

    def stream(self) -> ChunkStream:
        """Returns what makes chunks of the answer."""
        return ChunkStream(self, self._options)

    def closing(self, usage: dict[str, Any]) -> dict[str, Any]:
        """Returns the final chunk, which has usage and no choices."""
        return {**self._head, "object": self.chunk_object, "choices": [], "usage": usage}

    def opening(self, index: int) -> dict[str, Any] | None:
        """Returns the chunk that precedes the text of a choice; None: this kind has none."""
        return None

    @abstractmethod
    def _said(self, parts: Sequence[Part]) -> dict[str, Any]: ...

    @abstractmethod
    def _added(self, parts: Sequence[Part], index: int) -> list[dict[str, Any]]: ...

    @abstractmethod
    def _added_nothing(self) -> dict[str, Any]: ...

    @abstractmethod
    def _logprobs(self, events: Sequence[Event], offset: int) -> dict[str, Any] | None: ...


class ChunkStream:
    """Makes chunks of an answer as it comes.

    Args:
        frame: makes them.
        options: of the stream.
    """

    def __init__(self, frame: Answer, options: StreamOptions) -> None:
        self._frame, self._options = frame, options
        self._sent: dict[int, int] = {}  # choice -> characters sent so far
        self._called: set[int] = set()  # choices with a whole call

    def step(self, event: Event, parts: Sequence[Part]) -> list[bytes]:
        """Returns the chunks of one step."""
        choice, made = event.choice, []
        if choice not in self._sent:
            self._sent[choice] = 0
            if (opening := self._frame.opening(choice)) is not None:
                made.append(opening)
        if any(isinstance(part, CallEnd) for part in parts):
            self._called.add(choice)
        offset, called = self._sent[choice], choice in self._called
        chunks = self._frame.chunks(event, parts, offset=offset, called=called)
        if chunks and event.trace is not None:
            chunks[0]["redwood"] = event.trace
        self._sent[choice] += len(event.text)
        return [self._encoded(chunk) for chunk in (*made, *chunks)]

    def end(self, usage: dict[str, Any]) -> list[bytes]:
        """Returns the last chunks."""
        wanted = self._options.include_usage
        return [*([self._encoded(self._frame.closing(usage))] if wanted else []), DONE]

    def failed(self, error: ApiError) -> bytes:
        """Returns the event of an error in mid-stream."""
        return error.event

    def _encoded(self, chunk: dict[str, Any]) -> bytes:
        if self._options.include_usage:
            chunk = {"usage": None, **chunk}
        return encoded_event(chunk, padded=self._options.include_obfuscation)


class ChatAnswer(Answer):
    """Bodies of /v1/chat/completions."""

    prefix, object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def opening(self, index: int) -> dict[str, Any] | None:
        """Returns the chunk that holds the role."""
        choice = {
            "index": index,
            "delta": {"role": "assistant", "content": ""},
            "logprobs": None,
            "finish_reason": None,
        }
        return {**self._head, "object": self.chunk_object, "choices": [choice]}

    def _said(self, parts: Sequence[Part]) -> dict[str, Any]:
        said = gathered(parts)
        message: dict[str, Any] = {"role": "assistant", "content": said.text, "refusal": None}
        if said.reasoning:
            message["reasoning_content"] = said.reasoning
        if said.calls:
            message["content"] = said.text or None
            message["tool_calls"] = [
                {
                    "id": self._ids.new(),
                    "type": "function",
                    "function": {"name": call.name, "arguments": call.arguments},
                }
                for call in said.calls
            ]
        if said.malformed:
            message["redwood"] = {"malformed_calls": said.malformed}
        return {"message": message}

    def _added(self, parts: Sequence[Part], index: int) -> list[dict[str, Any]]:
        return [{"delta": delta} for part in parts if (delta := self._delta(part))]

    def _added_nothing(self) -> dict[str, Any]:
        return {"delta": {}}

    def _delta(self, part: Part) -> dict[str, Any]:
        match part:
            case Text(text):
                return {"content": text}
            case Reasoning(text):
                return {"reasoning_content": text}
            case Malformed(text, reason):
                malformed = {"text": text.strip(), "reason": reason}
                return {"content": text, "redwood": {"malformed_calls": [malformed]}}
            case CallStart(index, name):
                function = {"name": name, "arguments": ""}
                start = {"index": index, "id": self._ids.new(), "type": "function"}
                return {"tool_calls": [{**start, "function": function}]}
            case CallArguments(index, text):
                return {"tool_calls": [{"index": index, "function": {"arguments": text}}]}
        return {}

    def _logprobs(self, events: Sequence[Event], offset: int) -> dict[str, Any] | None:
        if all(event.logprobs is None for event in events):
            return None
        content = [
            {
                **self._token(token, found.logprob),
                "top_logprobs": [self._token(*each) for each in found.top],
            }
            for event in events
            for token, found in zip(event.token_ids, event.logprobs or (), strict=True)
        ]
        return {"content": content, "refusal": None}

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        return {
            "token": self._texts.text(token),
            "logprob": max(logprob, _LOWEST_LOGPROB),
            "bytes": self._texts.raw(token),
        }


class CompletionAnswer(Answer):
    """Bodies of /v1/completions."""

    prefix, object, chunk_object = "cmpl", "text_completion", "text_completion"

    def _said(self, parts: Sequence[Part]) -> dict[str, Any]:
        return {"text": gathered(parts).text}

    def _added(self, parts: Sequence[Part], index: int) -> list[dict[str, Any]]:
        return [{"text": part.text} for part in parts if isinstance(part, Text)]

    def _added_nothing(self) -> dict[str, Any]:
        return {"text": ""}

    def _logprobs(self, events: Sequence[Event], offset: int) -> dict[str, Any] | None:
        if all(event.logprobs is None for event in events):
            return None
        made: dict[str, list[Any]] = {
            "tokens": [],
            "token_logprobs": [],
            "top_logprobs": [],
            "text_offset": [],
        }
        for event in events:
            for token, found in zip(event.token_ids, event.logprobs or (), strict=True):
                text = self._texts.text(token)
                made["tokens"].append(text)
                made["token_logprobs"].append(max(found.logprob, _LOWEST_LOGPROB))
                made["top_logprobs"].append(
                    {self._texts.text(t): max(p, _LOWEST_LOGPROB) for t, p in reversed(found.top)}
                )
                made["text_offset"].append(offset)
                offset += len(text)
        return made


def usage_of(choices: Sequence[Choice], prompts: int) -> dict[str, Any]:
    """Returns the `usage` of a request, summed over its choices.

    Args:
        prompts: number of different prompts among the choices; each is counted once.

    Returns: OpenAI's fields, and under `redwood` the statistics of speculation.
    """
    stats = [choice.stats for choice in choices]
    per_prompt = max(1, len(choices) // prompts)
    prompt_tokens = sum(len(choice.prompt) for choice in choices[::per_prompt])
    cached = sum(each.num_cached_tokens for each in stats[::per_prompt])
    generated = sum(each.num_generated_tokens for each in stats)
    passes = sum(each.target_passes for each in stats)
    drafted = sum(each.num_draft_tokens for each in stats)
    accepted = sum(each.num_accepted_tokens for each in stats)
    seconds = sum(each.decode_seconds for each in stats)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": generated,
        "total_tokens": prompt_tokens + generated,
        "prompt_tokens_details": {"cached_tokens": cached, "audio_tokens": 0},
        "completion_tokens_details": {
            "accepted_prediction_tokens": sum(s.num_prediction_tokens_accepted for s in stats),
            "rejected_prediction_tokens": sum(s.num_prediction_tokens_rejected for s in stats),
            "reasoning_tokens": 0,
            "audio_tokens": 0,
        },
        "redwood": {
            "target_passes": passes,
            "num_drafts": sum(each.num_drafts for each in stats),
            "num_draft_tokens": drafted,
            "num_accepted_tokens": accepted,
            "draft_acceptance_rate": accepted / drafted if drafted else 0.0,
            "mean_acceptance_length": generated / passes if passes else 0.0,
            "tokens_per_s": generated / seconds if seconds else 0.0,
            "seconds": {
                stage: sum(each.seconds[stage] for each in stats) for stage in stats[0].seconds
            },
        },
    }
