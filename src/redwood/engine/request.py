"""One request in the engine: its text, its finish reason, and the results of its steps."""

from __future__ import annotations

from collections import deque
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any, NamedTuple

import numpy as np

from redwood.drafters.context import Context
from redwood.drafters.prediction import Prediction
from redwood.engine.detokenizer import Detokenizer, Tokenizer
from redwood.engine.stats import Stats
from redwood.errors import ArgumentError, CapacityError
from redwood.sampling import GumbelNoise, History, PathRows, SamplingParams, kernels
from redwood.tree import TokenTree
from redwood.verify import Acceptance


class TokenLogprobs(NamedTuple):
    """Log-probabilities at one generated token, of the law before temperature and truncation.

    Penalties, bias and a logits processor are in it; what they forbid has none (-inf).

    Args:
        logprob: of the token itself.
        top: (token, log-probability) of the most probable ones, best first.
    """

    logprob: float
    top: list[tuple[int, float]]


class Step(NamedTuple):
    """The result of one step for one request.

    Args:
        request: from `RowEngine.add`.
        token_ids: 1 .. depth + 1 new tokens, cut at the end; an end-of-sequence token is included.
        num_accepted: how many of them, the first ones, had been drafted.
        text: new text, whole characters; empty without a tokenizer.
        finish_reason: None, "stop" (end-of-sequence token or stop string), "length" or "error".
        tree: the tree that was scored.
        nodes: its accepted path, the root first.
        logprobs: one entry per token, where the request asks for them.
        error: what ended this request alone; there are no tokens then.
    """

    request: int
    token_ids: list[int]
    num_accepted: int
    text: str
    finish_reason: str | None
    tree: TokenTree
    nodes: list[int]
    logprobs: list[TokenLogprobs] | None = None
    error: Exception | None = None


@dataclass
class Caller:
    """A call of `generate` or `stream`: the statistics of its requests, and their steps.

    Args:
        stats: by number of the request, ended ones included.
        inbox: steps to be taken, whichever thread made them.
        unfinished: requests whose last step was not taken yet.
    """

    stats: dict[int, Stats] = field(default_factory=dict)
    inbox: deque[Step] = field(default_factory=deque)
    unfinished: set[int] = field(default_factory=set)

    def served(self, running: Container[int]) -> bool:
        """Whether a step can be taken, or none will come."""
        return bool(self.inbox) or not all(key in running for key in self.unfinished)


@dataclass
class Request:
    """A request from `add` to its end.

    Args:
        context: as drafters see it.
        limit: most tokens to generate: what was asked for, and what the context holds.
        inbox: where its steps go; None: to the caller of `step`.
        row: of the target, -1 while it waits.
        detokenizer: None without a tokenizer.
        leader: the request that reads the same beginning, `num_shared` tokens, which this one waits
            for; None: none.
        skipped: chunks of prompts that were read while this one had none.
        extra_tokens: tokens' worth of memory that its rows take beside keys and values.
        failed: it ended with an error, and what its row holds is not to be trusted.
    """

    context: Context
    limit: int
    inbox: deque[Step] | None = None
    row: int = -1
    detokenizer: Detokenizer | None = None
    stats: Stats = field(default_factory=Stats)
    leader: Request | None = None
    num_shared: int = 0
    skipped: int = 0
    extra_tokens: int = 0
    failed: bool = False

    @property
    def salt(self) -> str:
        """Only requests with the same one share keys and values."""
        return self.context.params.cache_salt

    @property
    def max_new_tokens(self) -> int:
        """Tokens it may still generate."""
        return self.limit - self.stats.num_generated_tokens

    @property
    def most_tokens(self) -> int:
        """KV slots that it may come to need."""
        return self.stats.num_prompt_tokens + self.limit + self.extra_tokens

    def advance(
        self, tree: TokenTree, kept: Acceptance, rows: PathRows, eos_ids: frozenset[int]
    ) -> Step:
        """Appends the new tokens to the text, up to where it ends."""
        path = kept.nodes[1:]
        tokens = [tree.token_list[node] for node in path] + [kept.next_token]
        reason = None
        for count, token in enumerate(tokens, start=1):
            reason = self._ends_at(token, count, eos_ids)
            if reason is not None:
                tokens = tokens[:count]
                break
        wanted = self.context.params.logprobs
        logprobs = None
        if wanted is not None:
            nodes = kept.nodes[: len(tokens)]
            logprobs = [_logprobs(rows, n, t, wanted) for n, t in zip(nodes, tokens, strict=True)]
        context, stats = self.context, self.stats
        context.token_ids.extend(tokens)
        context.history.extend(tokens)
        if self.context.prediction is not None:
            stats.num_prediction_tokens_accepted += self.context.prediction.follow(tokens)
        accepted = min(len(path), len(tokens))
        stats.target_passes += 1
        stats.num_drafts += len(tree) > 1
        stats.num_draft_tokens += len(tree) - 1
        stats.num_accepted_tokens += accepted
        stats.num_generated_tokens += len(tokens)
        text = ""
        if self.detokenizer is not None:
            text = self.detokenizer.take(final=reason is not None)
        return Step(context.key, tokens, accepted, text, reason, tree, kept.nodes, logprobs)

    def fail(self, error: Exception) -> Step:
        """Returns the last step of a failed request, with the text that was held back."""
        self.failed = True
        text = "" if self.detokenizer is None else self.detokenizer.take(final=True)
        root = TokenTree.chain(self.context.token_ids[-1:])
        return Step(self.context.key, [], 0, text, "error", root, [0], None, error)

    def _ends_at(self, token: int, count: int, eos_ids: frozenset[int]) -> str | None:
        """The finish reason if the text ends with this token, the `count`-th of the step."""
        if token in eos_ids and not self.context.params.ignore_eos:
            return "stop"
        if self.detokenizer is not None and self.detokenizer.push(token):
            return "stop"
        return "length" if count >= self.max_new_tokens else None


def new_request(
    key: int,
    tokens: list[int],
    params: SamplingParams,
    *,
    vocab_size: int,
    capacity: int,
    tokenizer: Tokenizer | None,
) -> Request:
    """Returns a request for a prompt.

    Raises:
        ArgumentError: an empty prompt, tokens outside the vocabulary, stop strings without a
            tokenizer.
        CapacityError: a prompt that leaves no room for one token.
    """
    if not isinstance(params, SamplingParams):
        raise ArgumentError(f"params must be SamplingParams, not {type(params).__name__}")
    if not tokens:
        raise ArgumentError("the prompt is empty: give at least one token")
    if not 0 <= min(tokens) <= max(tokens) < vocab_size:
        raise ArgumentError(f"the prompt has tokens outside the vocabulary of {vocab_size}")
    if any(token >= vocab_size for token in params.logit_bias):
        raise ArgumentError(f"logit_bias names tokens outside the vocabulary of {vocab_size}")
    if any(token >= vocab_size for token in params.prediction):
        raise ArgumentError(f"prediction has tokens outside the vocabulary of {vocab_size}")
    if len(tokens) > capacity - 1:
        raise CapacityError(
            f"the prompt has {len(tokens)} tokens, the context holds {capacity} with the "
            "answer: shorten the prompt"
        )
    if params.stop and tokenizer is None:
        raise ArgumentError("stop strings need an engine with a tokenizer")
    seed = params.seed
    noise = None
    if params.coupled and params.temperature > 0.0:
        noise = GumbelNoise(_fresh_seed() if seed is None else seed, vocab_size)
    context = Context(
        key=key,
        token_ids=tokens,
        params=params,
        history=History(tokens),
        vocab_size=vocab_size,
        rng=np.random.default_rng(None if seed is None else seed % 2**64),
        noise=noise,
    )
    request = Request(context, min(params.max_tokens, capacity - len(tokens)))
    request.stats.num_prompt_tokens = len(tokens)
    if tokenizer is not None:
        request.detokenizer = Detokenizer(tokenizer, params.stop, params.visible_tokens)
    if params.prediction and params.speculate:
        context.prediction = Prediction(params.prediction)
        request.stats.num_prediction_tokens = len(params.prediction)
    return request


def token_list(prompt: Any) -> list[int]:
    """Returns token ids as Python integers; any sequence of integers, array or tensor [L].

    Raises:
        ArgumentError: anything else: it is not guessed what is meant.
    """
    given = prompt.tolist() if hasattr(prompt, "tolist") else prompt
    odd = isinstance(given, str | bytes | Mapping) or not isinstance(given, Iterable)
    tokens = [] if odd else list(given)
    if odd or any(isinstance(t, bool) or not isinstance(t, Integral) for t in tokens):
        raise ArgumentError("a prompt must be token ids: whole numbers, one after another")
    return [int(token) for token in tokens]


def _logprobs(rows: PathRows, node: int, token: int, count: int) -> TokenLogprobs:
    row = rows.scores(node).numpy()
    high = row.max()
    log_mass = high + np.log(np.exp(row - high).sum())
    values, ids = kernels.top(row, count) if count else (row[:0], row[:0])
    found = zip(values, ids, strict=True)
    top = [(int(i), float(v - log_mass)) for v, i in found if v > -np.inf]
    return TokenLogprobs(float(row[token] - log_mass), top)


def _fresh_seed() -> int:
    return int(np.random.SeedSequence().generate_state(1, np.uint64)[0])
