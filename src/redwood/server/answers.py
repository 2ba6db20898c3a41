"""Response bodies of OpenAI's API: whole, in chunks, with log-probabilities and usage."""

from __future__ import annotations

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from redwood.server.generation import Choice, Event
from redwood.server.tokens import TokenTexts

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

    def __init__(self, model: str, texts: TokenTexts, fingerprint: str) -> None:
        self._texts = texts
        self._head = {
            "id": f"{self.prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": fingerprint,
        }

    def whole(self, events: Sequence[Sequence[Event]], usage: dict[str, Any]) -> dict[str, Any]:
        """Returns the answer from the events of each choice."""
        choices = [
            {
                "index": index,
                **self._said("".join(event.text for event in those)),
                "logprobs": self._logprobs(those, 0),
                "finish_reason": those[-1].finish_reason,
            }
            for index, those in enumerate(events)
        ]
        return {**self._head, "object": self.object, "choices": choices, "usage": usage}

    def chunk(self, event: Event, *, offset: int = 0) -> dict[str, Any]:
        """Returns the chunk of one event.

        Args:
            offset: characters of the choice's text before this event.
        """
        choice = {
            "index": event.choice,
            **self._adds(event.text),
            "logprobs": self._logprobs([event], offset),
            "finish_reason": event.finish_reason,
        }
        return {**self._head, "object": self.chunk_object, "choices": [choice]}

    def closing(self, usage: dict[str, Any]) -> dict[str, Any]:
        """Returns the final chunk, which has usage and no choices."""
        return {**self._head, "object": self.chunk_object, "choices": [], "usage": usage}

    def opening(self, index: int) -> dict[str, Any] | None:
        """Returns the chunk that precedes the text of a choice; None: this kind has none."""
        return None

    @abstractmethod
    def _said(self, text: str) -> dict[str, Any]: ...

    @abstractmethod
    def _adds(self, text: str) -> dict[str, Any]: ...

    @abstractmethod
    def _logprobs(self, events: Sequence[Event], offset: int) -> dict[str, Any] | None: ...


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

    def _said(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def _adds(self, text: str) -> dict[str, Any]:
        return {"delta": {"content": text} if text else {}}

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

    def _said(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def _adds(self, text: str) -> dict[str, Any]:
        return {"text": text}

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
