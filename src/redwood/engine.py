"""The engine: rows of requests, one step of drafting, scoring, verifying and committing at a time.

`step` is the whole loop: waiting requests get a row, prompts are filled in chunks beside the rows
that decode, and every row that has its prompt in place takes one tree through the target. Rows join
and leave between steps. What goes wrong in one row ends that row alone.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence
from itertools import count
from time import perf_counter

import torch
from torch import Tensor

from redwood import verify
from redwood.algorithms.specinfer import merge_trees
from redwood.backends.base import Backend, Kept, Nodes
from redwood.context import Context
from redwood.drafting import Drafter, NoDrafter, prefill
from redwood.errors import ArgumentError, CapacityError, check_count
from redwood.planner import Plan, Planner
from redwood.requests import Request, new_request, token_list
from redwood.requests import Step as Step
from redwood.sampling import PathRows, SamplingParams
from redwood.scheduling import admitted, chunks, one_pool, propose_each
from redwood.stats import Stats
from redwood.text import Tokenizer
from redwood.timing import recordings_of, wait_for
from redwood.tree import TokenTree

_log = logging.getLogger(__name__)
_keys = count(1)  # of all engines: those on one target may share a drafter
_PREDICTED = 8  # nodes for a predicted output where the budget is less


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
        prefill_chunk: prompt tokens per forward while no row decodes.
        prefill_beside: the same in a forward that decodes other rows, too, which wait for it; None:
            an eighth on a CPU, where tokens are dear, else the same.
        kv_tokens: most tokens, prompts and answers, that the rows may come to hold together; more
            requests wait. None: `max_rows` alone decides.

    Raises:
        ArgumentError: a budget, row count, chunk or number of tokens below 1.
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
        prefill_beside: int | None = None,
        kv_tokens: int | None = None,
    ) -> None:
        if prefill_beside is None:
            prefill_beside = prefill_chunk
            if target.device.type == "cpu" and isinstance(prefill_chunk, int):
                prefill_beside = max(1, prefill_chunk // 8)
        for name, value in (
            ("budget", budget),
            ("max_rows", max_rows),
            ("prefill_chunk", prefill_chunk),
            ("prefill_beside", prefill_beside),
            ("kv_tokens", 1 if kv_tokens is None else kv_tokens),
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
        self.budget, self.max_rows, self.kv_tokens = budget, max_rows, kv_tokens
        self.prefill_chunk, self.prefill_beside = prefill_chunk, prefill_beside
        self._requests: dict[int, Request] = {}
        self._waiting: deque[int] = deque()
        self._active: list[int] = []
        self._unclaimed: list[Step] = []  # for the caller of `step`

    def add(self, prompt: Sequence[int], params: SamplingParams | None = None) -> int:
        """Queues a request; returns its number, which `step` reports.

        Args:
            prompt: token ids, at least one.

        Raises:
            ArgumentError: an empty prompt, one of other things than token ids, a token outside the
                vocabulary, stop strings without a tokenizer.
            CapacityError: a prompt that leaves no room for one token, a request that may need more
                than `kv_tokens`.
        """
        request = new_request(
            next(_keys),
            token_list(prompt),
            SamplingParams() if params is None else params,
            vocab_size=self.target.vocab_size,
            capacity=self.target.capacity,
            tokenizer=self.tokenizer,
        )
        if self.kv_tokens is not None and request.most_tokens > self.kv_tokens:
            raise CapacityError(
                f"prompt and answer may take {request.most_tokens} tokens, all rows together have "
                f"{self.kv_tokens}: shorten the prompt, or lower max_tokens"
            )
        key = request.context.key
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

        A row whose prompt is still being filled returns nothing yet. A row that fails alone ends
        with the reason "error". When this raises, all requests that ran are dropped and their rows
        freed; waiting ones stay. Steps for `generate` and `stream` go to them.
        """
        with one_pool(self.target, self.drafter):
            return self._step()

    def _step(self) -> list[Step]:
        try:
            self._admit()
            running = [self._requests[key] for key in self._active]
            filling = [request for request in running if self._unfilled(request)]
            ready = [request for request in running if not self._unfilled(request)]
            if ready:
                self._decode(ready, chunks(filling, self.target.length, self.prefill_beside))
            elif filling:
                self._fill(chunks(filling, self.target.length, self.prefill_chunk))
                ready = [request for request in filling if not self._unfilled(request)]
                if ready:
                    self._decode(ready, [])
        except BaseException:
            for key in list(self._active):
                self.cancel(key)
            raise
        steps, self._unclaimed = self._unclaimed, []
        return steps

    def _admit(self) -> None:
        """Gives rows to those who may have one."""
        waiting = [self._requests[key] for key in self._waiting]
        running = [self._requests[key] for key in self._active]
        for request in admitted(waiting, running, self.max_rows, self.kv_tokens):
            request.row = self.target.open()
            self._active.append(self._waiting.popleft())

    def _unfilled(self, request: Request) -> bool:
        return self.target.length(request.row) < len(request.context.token_ids) - 1

    def _fill(self, parts: Sequence[tuple[Request, Nodes]]) -> None:
        """Puts parts of prompts in place, no row decoding beside."""
        clock = _Clock([request.stats for request, _ in parts], self.target.device)
        self.target.extend([nodes for _, nodes in parts])
        self.target.commit([_whole(nodes) for _, nodes in parts])
        clock.lap("prefill")

    def _decode(self, ready: Sequence[Request], parts: Sequence[tuple[Request, Nodes]]) -> None:
        """One step of rows that have their prompt, and parts of other prompts beside them."""
        clock = _Clock([request.stats for request in ready], self.target.device)
        trees, planner, plan = self._draft(ready, clock)
        nodes = [
            Nodes(request.row, tree.token_list, tree.parent_list) for request, tree in trees
        ] + [nodes for _, nodes in parts]
        if not nodes:
            return
        before = recordings_of(self.target)
        logits = self.target.extend(nodes)
        usual = recordings_of(self.target) == before
        target_s = clock.lap("target" if usual else "prefill")  # a graph is recorded once
        judged = []
        for (request, tree), scored in zip(trees, logits, strict=False):
            try:
                rows = PathRows(scored, tree, request.context.params, request.context.history)
                judged.append((request, tree, rows, judge_rows(request.context, tree, rows)))
            except Exception as error:
                self._give(request, request.fail(error))
        other_s = clock.lap("verify")
        self.target.commit(
            [Kept(request.row, kept.nodes) for request, _, _, kept in judged]
            + [_whole(nodes) for _, nodes in parts]
        )
        steps = []
        for request, tree, rows, kept in judged:
            try:
                steps.append((request, request.advance(tree, kept, rows, self.eos_ids)))
            except Exception as error:
                steps.append((request, request.fail(error)))
        other_s += clock.lap("other")
        for request, _ in parts:
            request.stats.seconds["prefill"] += target_s
        if planner is not None and plan is not None and len(steps) == len(ready):
            counts = [len(step.token_ids) for _, step in steps]
            contexts = [request.context for request in ready]
            timed_s = target_s if usual and not parts else None
            planner.end(plan, contexts, counts, timed_s, other_s)
        for request, step in steps:
            self._give(request, step)
        clock.lap("other")

    def _give(self, request: Request, step: Step) -> None:
        """Hands a step to whom it belongs, and ends the request if it was the last."""
        if step.finish_reason is not None:
            self.cancel(step.request)
        (self._unclaimed if request.inbox is None else request.inbox).append(step)

    def _draft(
        self, ready: Sequence[Request], clock: _Clock
    ) -> tuple[list[tuple[Request, TokenTree]], Planner | None, Plan | None]:
        """Trees of the rows whose drafting went well, and the plan they follow, if there is one."""
        contexts, rooms = [r.context for r in ready], [self._room(r) for r in ready]
        planner, plan, drafter = self.planner, None, self.drafter
        budgets, most = [min(self.budget, room) for room in rooms], max(self.budget, _PREDICTED)
        # The text of some requests may not depend on what was measured, nor may their company.
        if max(rooms) == 1 or any(context.unsteered for context in contexts):
            planner = None
        if planner is not None:
            known = planner.prepared
            plan = planner.begin(contexts, rooms, [request.room for request in ready])
            drafter, budgets, most = plan.drafter, plan.budgets, planner.most
            clock.lap("draft" if known else "prefill")  # times are measured once
        drafting = [i for i, budget in enumerate(budgets) if budget > 1]
        try:
            prefill(drafter, [contexts[i] for i in drafting])
        except Exception:  # a drafter that cannot go on says so below, where it is known for whom
            _log.warning("a drafter could not read its texts beforehand", exc_info=True)
        clock.lap("prefill")
        made: dict[int, TokenTree | Exception]
        before = recordings_of(*_backends(drafter))
        if plan is not None and plan.drafted is not None:
            made = {i: plan.drafted[i] for i in drafting}
        else:
            proposed = propose_each(
                drafter, [contexts[i] for i in drafting], [budgets[i] for i in drafting]
            )
            made = dict(zip(drafting, proposed, strict=True))
        trees = []
        for i, (request, room) in enumerate(zip(ready, rooms, strict=True)):
            if i in made:
                drafted = _checked(contexts[i], made[i], budgets[i])
            else:
                drafted = TokenTree.chain(contexts[i].token_ids[-1:])
            if isinstance(drafted, Exception):
                self._give(request, request.fail(drafted))
                continue
            if request.prediction is not None and room > 1:
                size = min(room - len(drafted) + 1, most)
                chain = request.prediction.tree(drafted.token_list[0], size)
                drafted = merge_trees([drafted, chain])
            trees.append((request, drafted))
        usual = recordings_of(*_backends(drafter)) == before
        drafting_s = clock.lap("draft" if usual else "prefill")
        if planner is not None and plan is not None:
            if len(trees) < len(ready) or not usual:  # nothing is to be learned from its time
                planner.drop(plan)
                return trees, None, None
            kept = planner.trim(plan, [tree for _, tree in trees], drafting_s)
            trees = list(zip(ready, kept, strict=True))
        return trees, planner, plan

    def _room(self, request: Request) -> int:
        """Nodes that fit; none is drafted for a last token, nor where the caller wants none."""
        free = self.target.capacity - self.target.length(request.row)
        wanted = request.room > 1 and request.context.params.speculate
        return max(1, free) if wanted else 1


def judge(context: Context, tree: TokenTree, logits: Tensor) -> verify.Acceptance:
    """Returns what the request's rule accepts of a tree; logits: [N, V]."""
    return judge_rows(context, tree, PathRows(logits, tree, context.params, context.history))


def judge_rows(context: Context, tree: TokenTree, rows: PathRows) -> verify.Acceptance:
    """Returns what the request's rule accepts of a tree, given the target's rows."""
    params = context.params
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


def _checked(context: Context, tree: TokenTree | Exception, budget: int) -> TokenTree | Exception:
    """A drafter may be anyone's: a wrong root would be verified as if it were the text."""
    if isinstance(tree, Exception):
        return tree
    tokens = tree.token_list
    if tokens[0] != context.token_ids[-1]:
        return ArgumentError(f"the drafter's root is {tokens[0]}, not {context.token_ids[-1]}")
    if len(tokens) > budget:
        return CapacityError(f"the drafter made {len(tokens)} nodes for a budget of {budget}")
    if max(tokens) >= context.vocab_size:
        return ArgumentError(f"the drafter's token {max(tokens)} is beyond the vocabulary")
    return tree


def _backends(drafter: Drafter) -> list[Backend]:
    parts = getattr(drafter, "parts", [drafter])
    return [part.backend for part in parts if hasattr(part, "backend")]


def _whole(nodes: Nodes) -> Kept:
    return Kept(nodes.row, range(len(nodes.token_ids)))


class _Clock:
    """Adds the seconds since the last lap to a stage of several requests.

    A stage ends when the device has done what was launched in it.
    """

    def __init__(self, stats: Sequence[Stats], device: torch.device) -> None:
        self._stats, self._device, self._last = stats, device, perf_counter()

    def lap(self, stage: str) -> float:
        wait_for(self._device)
        now = perf_counter()
        taken, self._last = now - self._last, now
        for stats in self._stats:
            stats.seconds[stage] += taken
        return taken
