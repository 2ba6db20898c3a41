"""The engine: rows of requests, one step of drafting, scoring, verifying and committing at a time.

`step` is the whole loop: waiting requests get a row, prompts are filled in chunks, and every row
that has its prompt in place takes one tree through the target. Rows join and leave between steps.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from redwood import verify
from redwood.backends.base import Backend, Kept, Nodes
from redwood.context import Context
from redwood.drafting import Drafter, NoDrafter, prefill
from redwood.errors import ArgumentError, CapacityError, check_count
from redwood.planner import Plan, Planner
from redwood.sampling import GumbelNoise, History, PathRows, SamplingParams
from redwood.stats import Stats
from redwood.text import Detokenizer, Tokenizer
from redwood.tree import TokenTree


class Step(NamedTuple):
    """What one step gave one request.

    Args:
        request: from `RowEngine.add`.
        token_ids: 1 .. depth + 1 new tokens, cut at the end; an end-of-sequence token is included.
        num_accepted: how many of them, the first ones, had been drafted.
        text: new text, whole characters; empty without a tokenizer.
        finish_reason: None, "stop" (end-of-sequence token or stop string) or "length".
        tree: the tree that was scored.
        nodes: its accepted path, the root first.
    """

    request: int
    token_ids: list[int]
    num_accepted: int
    text: str
    finish_reason: str | None
    tree: TokenTree
    nodes: list[int]


@dataclass
class _Request:
    context: Context
    limit: int  # most tokens to generate: what was asked for, and what the context holds
    inbox: deque[Step] | None = None  # where its steps go; None: to the caller of `step`
    row: int = -1
    detokenizer: Detokenizer | None = None
    stats: Stats = field(default_factory=Stats)

    @property
    def room(self) -> int:
        """Tokens it may still generate."""
        return self.limit - self.stats.num_generated_tokens


class RowEngine:
    """Decodes requests through token trees, exactly.

    Args:
        target: the model to be true to.
        drafter: None: plain decoding.
        tokenizer: for text and stop strings; without it only token ids come out.
        eos_ids: tokens that end a text.
        budget: nodes that the target scores per step for a row, the root included.
        planner: chooses drafter and sizes for every step; `drafter` and `budget` then hold only for
            requests with a seed that are not coupled: what they say may not depend on time.
        max_rows: requests decoded at once; more wait.
        prefill_chunk: prompt tokens per forward.

    Raises:
        ArgumentError: a budget, row count or chunk below 1.
        CapacityError: a budget beyond the target's capacity.
    """

    def __init__(
        self,
        target: Backend,
        drafter: Drafter | None = None,
        *,
        tokenizer: Tokenizer | None = None,
        eos_ids: Sequence[int] = (),
        budget: int = 16,
        planner: Planner | None = None,
        max_rows: int = 64,
        prefill_chunk: int = 512,
    ) -> None:
        for name, value in (
            ("budget", budget),
            ("max_rows", max_rows),
            ("prefill_chunk", prefill_chunk),
        ):
            check_count(name, value)
        if budget > target.capacity:
            raise CapacityError(
                f"budget {budget} exceeds the capacity of {target.capacity} slots: lower it"
            )
        self.target = target
        self.drafter: Drafter = drafter or NoDrafter()
        self.planner = planner
        self.tokenizer = tokenizer
        self.eos_ids = frozenset(eos_ids)
        self.budget, self.max_rows, self.prefill_chunk = budget, max_rows, prefill_chunk
        self._requests: dict[int, _Request] = {}
        self._waiting: deque[int] = deque()
        self._active: list[int] = []
        self._unclaimed: list[Step] = []  # for the caller of `step`
        self._next_key = 0

    def add(self, prompt: Sequence[int], params: SamplingParams | None = None) -> int:
        """Queues a request; returns its number, which `step` reports.

        Args:
            prompt: token ids, at least one.

        Raises:
            ArgumentError: an empty prompt, one of other things than token ids, a token outside the
                vocabulary, stop strings without a tokenizer.
            CapacityError: a prompt that leaves no room for one token.
        """
        params = SamplingParams() if params is None else params
        if not isinstance(params, SamplingParams):
            raise ArgumentError(f"params must be SamplingParams, not {type(params).__name__}")
        tokens = token_list(prompt)
        vocab_size, capacity = self.target.vocab_size, self.target.capacity
        if not tokens:
            raise ArgumentError("the prompt is empty: give at least one token")
        if not 0 <= min(tokens) <= max(tokens) < vocab_size:
            raise ArgumentError(f"the prompt has tokens outside the vocabulary of {vocab_size}")
        if any(token >= vocab_size for token in params.logit_bias):
            raise ArgumentError(f"logit_bias names tokens outside the vocabulary of {vocab_size}")
        if len(tokens) > capacity - 1:
            raise CapacityError(
                f"the prompt has {len(tokens)} tokens, the context holds {capacity} with the "
                "answer: shorten the prompt"
            )
        if params.stop and self.tokenizer is None:
            raise ArgumentError("stop strings need an engine with a tokenizer")
        self._next_key += 1
        key = self._next_key
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
        request = _Request(context, min(params.max_tokens, capacity - len(tokens)))
        request.stats.num_prompt_tokens = len(tokens)
        if self.tokenizer is not None:
            request.detokenizer = Detokenizer(self.tokenizer, params.stop)
        self._requests[key] = request
        self._waiting.append(key)
        return key

    @property
    def busy(self) -> bool:
        """Whether any request waits or runs."""
        return bool(self._requests)

    def stats(self, request: int) -> Stats:
        """Returns the live statistics of a request that has not ended.

        Raises:
            ArgumentError: there is none of this number.
        """
        if request not in self._requests:
            raise ArgumentError(f"there is no request {request}: it ended, or never began")
        return self._requests[request].stats

    def cancel(self, request: int) -> None:
        """Drops a request and frees its row; unknown numbers are fine."""
        dropped = self._requests.pop(request, None)
        if dropped is None:
            return
        if request in self._active:
            self._active.remove(request)
        else:
            self._waiting.remove(request)
        try:
            if dropped.row >= 0:
                self.target.release(dropped.row)
        finally:
            self.drafter.release(request)
            if self.planner is not None:
                self.planner.release(request)

    def step(self) -> list[Step]:
        """Does one step for all rows; returns what each decoding row got.

        A row whose prompt is still being filled returns nothing yet. When this raises, the requests
        that ran are dropped and their rows freed; waiting ones stay. Steps for
        `generate` and `stream` go to them.
        """
        try:
            while self._waiting and len(self._active) < self.max_rows:
                key = self._waiting.popleft()
                self._active.append(key)
                self._requests[key].row = self.target.open()
            running = [self._requests[key] for key in self._active]
            ready = [request for request in running if self._prefill(request)]
            if ready:
                self._decode(ready)
        except BaseException:
            for key in list(self._active):
                self.cancel(key)
            raise
        steps, self._unclaimed = self._unclaimed, []
        return steps

    def _prefill(self, request: _Request) -> bool:
        """Puts one chunk of the prompt, all but its last token, in place; returns whether done."""
        tokens, done = request.context.token_ids, self.target.length(request.row)
        if request.stats.target_passes or done >= len(tokens) - 1:
            return True
        start = perf_counter()
        chunk = tokens[done : min(done + self.prefill_chunk, len(tokens) - 1)]
        self.target.extend([Nodes(request.row, chunk, num_logits=1)])
        self.target.commit([Kept(request.row, range(len(chunk)))])
        request.stats.seconds["prefill"] += perf_counter() - start
        return done + len(chunk) >= len(tokens) - 1

    def _decode(self, ready: Sequence[_Request]) -> None:
        clock = _Clock([request.stats for request in ready])
        contexts = [request.context for request in ready]
        # The text of some requests may not depend on what was measured, nor may their company.
        planner = None if any(context.unsteered for context in contexts) else self.planner
        trees, plan = self._draft(ready, planner, clock)
        logits = self.target.extend(
            [
                Nodes(request.row, tree.token_list, tree.parent_list)
                for request, tree in zip(ready, trees, strict=True)
            ]
        )
        target_s = clock.lap("target")
        accepted = [
            judge(context, tree, rows)
            for context, tree, rows in zip(contexts, trees, logits, strict=True)
        ]
        other_s = clock.lap("verify")
        self.target.commit([Kept(r.row, a.nodes) for r, a in zip(ready, accepted, strict=True)])
        steps = [
            self._advance(request, tree, kept)
            for request, tree, kept in zip(ready, trees, accepted, strict=True)
        ]
        other_s += clock.lap("other")
        if planner is not None and plan is not None:
            counts = [len(step.token_ids) for step in steps]
            planner.end(plan, contexts, counts, target_s, other_s)
        for request, step in zip(ready, steps, strict=True):
            if step.finish_reason is not None:
                self.cancel(step.request)
            (self._unclaimed if request.inbox is None else request.inbox).append(step)
        clock.lap("other")

    def _draft(
        self, ready: Sequence[_Request], planner: Planner | None, clock: _Clock
    ) -> tuple[list[TokenTree], Plan | None]:
        """Trees for all rows, and the plan they follow, if there is one."""
        contexts, rooms = [r.context for r in ready], [self._room(r) for r in ready]
        plan, drafter = None, self.drafter
        budgets = [min(self.budget, room) for room in rooms]
        if planner is not None:
            plan = planner.begin(contexts, rooms, [request.room for request in ready])
            drafter, budgets = plan.drafter, plan.budgets
        prefill(drafter, contexts)
        clock.lap("prefill")
        trees = drafter.propose(contexts, budgets)
        for context, tree, budget in zip(contexts, trees, budgets, strict=True):
            _check_draft(context, tree, budget)
        drafting_s = clock.lap("draft")
        if planner is not None and plan is not None:
            trees = planner.trim(plan, trees, drafting_s)
        return trees, plan

    def _room(self, request: _Request) -> int:
        """Nodes that fit; none is drafted for a last token."""
        free = self.target.capacity - self.target.length(request.row)
        return max(1, free) if request.room > 1 else 1

    def _advance(self, request: _Request, tree: TokenTree, kept: verify.Acceptance) -> Step:
        """Appends the new tokens to the text, up to where it ends."""
        path = kept.nodes[1:]
        tokens = [tree.token_list[node] for node in path] + [kept.next_token]
        reason = None
        for count, token in enumerate(tokens, start=1):
            reason = self._ends_at(request, token, count)
            if reason is not None:
                tokens = tokens[:count]
                break
        context, stats = request.context, request.stats
        context.token_ids.extend(tokens)
        context.history.extend(tokens)
        accepted = min(len(path), len(tokens))
        stats.target_passes += 1
        stats.num_drafts += len(tree) > 1
        stats.num_draft_tokens += len(tree) - 1
        stats.num_accepted_tokens += accepted
        stats.num_generated_tokens += len(tokens)
        text = ""
        if request.detokenizer is not None:
            text = request.detokenizer.take(final=reason is not None)
        return Step(context.key, tokens, accepted, text, reason, tree, kept.nodes)

    def _ends_at(self, request: _Request, token: int, count: int) -> str | None:
        """Whether the text ends with this token, the `count`-th of the step, and why."""
        if token in self.eos_ids and not request.context.params.ignore_eos:
            return "stop"
        if request.detokenizer is not None and request.detokenizer.push(token):
            return "stop"
        return "length" if count >= request.room else None


def judge(context: Context, tree: TokenTree, logits: Tensor) -> verify.Acceptance:
    """Returns what the request's rule accepts of a tree; logits: [N, V]."""
    params = context.params
    rows = PathRows(logits, tree, params, context.history)
    if params.temperature == 0.0:
        return verify.greedy(tree, rows.best)
    if context.noise is not None:
        noise, first = context.noise, len(context.token_ids)
        return verify.coupled_by(
            tree, lambda node: rows.choice(node, noise, first + tree.depths[node])
        )
    rule: Callable[..., verify.Acceptance] = verify.traversal
    if params.verifier == "recursive":
        rule = verify.recursive
    return rule(tree, rows, context.rng.random(len(tree)))


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


def _check_draft(context: Context, tree: TokenTree, budget: int) -> None:
    """A drafter may be anyone's: a wrong root would be verified as if it were the text."""
    tokens = tree.token_list
    if tokens[0] != context.token_ids[-1]:
        raise ArgumentError(f"the drafter's root is {tokens[0]}, not {context.token_ids[-1]}")
    if len(tokens) > budget:
        raise CapacityError(f"the drafter made {len(tokens)} nodes for a budget of {budget}")
    if max(tokens) >= context.vocab_size:
        raise ArgumentError(f"the drafter's token {max(tokens)} is beyond the vocabulary")


class _Clock:
    """Adds the seconds since the last lap to a stage of several requests."""

    def __init__(self, stats: Sequence[Stats]) -> None:
        self._stats, self._last = stats, perf_counter()

    def lap(self, stage: str) -> float:
        now = perf_counter()
        taken, self._last = now - self._last, now
        for stats in self._stats:
            stats.seconds[stage] += taken
        return taken


def _fresh_seed() -> int:
    return int(np.random.SeedSequence().generate_state(1, np.uint64)[0])
