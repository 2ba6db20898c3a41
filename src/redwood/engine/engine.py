"""The engine: rows of requests, one step of drafting, scoring, verifying and committing at a time.

`step` is the whole loop: waiting requests get a row, prompts are prefilled in chunks beside the
rows that decode, and every prefilled row passes one tree through the target. Rows join and leave
between steps. A fault in one row ends that row alone; a fault in a drafter ends none.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import count
from queue import SimpleQueue

from redwood.backends.base import AcceptedPath, Backend, Nodes
from redwood.drafters.base import Drafter, NoDrafter, draft_models, observers_of
from redwood.drafters.proposing import observe, release
from redwood.engine.detokenizer import Tokenizer
from redwood.engine.drafting import Drafts, draft
from redwood.engine.prefix_cache import PrefixCache
from redwood.engine.request import Caller, Request, new_request, token_list
from redwood.engine.request import Step as Step
from redwood.engine.scheduler import chunks, extra_tokens, one_pool
from redwood.engine.stats import Clock, Stats
from redwood.engine.turns import turn, when_free
from redwood.engine.verification import Accepted, Scored, verify_rows
from redwood.errors import (
    ArgumentError,
    CapacityError,
    RedwoodError,
    check_count,
    check_process,
)
from redwood.planner.planner import Planner
from redwood.profiling.measure import recordings_of, wait_for
from redwood.sampling import PathRows, SamplingParams

_log = logging.getLogger(__name__)
_keys = count(1)  # of all engines: those on one target may share a drafter


class RowEngine:
    """Decodes requests through token trees, exactly. May be called from several threads.

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
            an eighth on a CPU, where prefill is expensive, else the same.
        kv_tokens: most tokens, prompts and answers, that the rows may come to hold together; more
            requests wait. None: `max_rows` alone decides. What `kv_cache` holds counts, and goes
            when rows need the room.
        kv_cache: bytes of keys and values that stay after requests have ended, for others that
            begin alike; 0: none. Backends that cannot share them keep none.

    Attributes:
        prefixes: what stays, see `PrefixCache`.

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
        kv_cache: int = 0,
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
        self.prefixes = PrefixCache(target, kv_cache)
        self._pid, self._callers = os.getpid(), threading.local()
        # From any thread at any moment; the attributes below them belong to the step in progress.
        self._requests: dict[int, Request] = {}
        self._arrived, self._dropped = SimpleQueue[int](), SimpleQueue[int]()
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
            UnsupportedError: a process forked from the one that made this engine.
        """
        check_process(self._pid)
        caller = self._taken_caller()
        request = new_request(
            next(_keys),
            token_list(prompt),
            SamplingParams() if params is None else params,
            vocab_size=self.target.vocab_size,
            capacity=self.target.capacity,
            tokenizer=self.tokenizer,
        )
        request.extra_tokens = extra_tokens(self.target, self.drafter, request.most_tokens)
        if self.kv_tokens is not None and request.most_tokens > self.kv_tokens:
            raise CapacityError(
                f"prompt and answer may take {request.most_tokens} tokens, all rows together have "
                f"{self.kv_tokens}: shorten the prompt, or lower max_tokens"
            )
        key = request.context.key
        if caller is not None:
            request.inbox, caller.stats[key] = caller.inbox, request.stats
        self._requests[key] = request
        self._arrived.put(key)
        return key

    @contextmanager
    def _called_by(self, caller: Caller) -> Iterator[None]:
        """Whom the next `add` or `step` of this thread is for; both may be replaced by anyone."""
        self._callers.now = caller
        try:
            yield
        finally:
            self._callers.now = None

    def _taken_caller(self) -> Caller | None:
        caller: Caller | None = getattr(self._callers, "now", None)
        self._callers.now = None  # what a processor adds in this step is its own
        return caller

    @property
    def busy(self) -> bool:
        """Whether any request waits or runs."""
        return bool(self._requests)

    def stats(self, request: int) -> Stats:
        """Returns the live statistics of a request that has not ended.

        Raises:
            ArgumentError: there is none of this number.
        """
        known = self._requests.get(request)
        if known is None:
            raise ArgumentError(f"there is no request {request}: it ended, or never began")
        return known.stats

    def cancel(self, request: int) -> None:
        """Drops a request and frees its row; unknown numbers are fine.

        During a step, of this or of another thread, it is dropped at the end of that step.
        """
        if request not in self._requests:
            return
        if os.getpid() != self._pid:  # a forked child: the row is its parent's
            self._requests.pop(request, None)
            return
        self._dropped.put(request)
        when_free(self._things(), self._end_dropped)

    def _end_dropped(self) -> None:
        while not self._dropped.empty():
            self._end(self._dropped.get())

    def _end(self, key: int) -> None:
        """Forgets a request and frees its row."""
        self._sort_in()
        dropped = self._requests.pop(key, None)
        if dropped is None:
            return
        (self._active if key in self._active else self._waiting).remove(key)
        try:
            self.prefixes.close(dropped)
        finally:
            release(self.drafter, key)
            if self.planner is not None:
                self.planner.release(key)

    def _sort_in(self) -> None:
        while not self._arrived.empty():
            self._waiting.append(self._arrived.get())

    def _things(self) -> list[object]:
        """What a step uses exclusively."""
        parts = [self.drafter, *getattr(self.drafter, "parts", ())]
        return [self, self.target, *parts, *(getattr(part, "backend", None) for part in parts)]

    def step(self) -> list[Step]:
        """Does one step for all rows; returns what each decoding row got.

        A row whose prompt is still being filled returns nothing yet. A row that fails alone ends
        with the reason "error". When this raises, all requests that ran are dropped and their rows
        freed; waiting ones stay. Steps for `generate` and `stream` go to them. One thread makes a
        step at a time, on this engine or on others with its models or drafters; others wait.

        Raises:
            UnsupportedError: a process forked from the one that made this engine, or a call from
                inside of a step.
        """
        check_process(self._pid)
        caller = self._taken_caller()

        def needless() -> bool:
            return caller is not None and caller.served(self._requests)

        with turn(self._things(), needless) as mine:
            if mine:
                with one_pool(self.target, self.drafter):
                    self._step_all()
                self._end_dropped()
            if caller is not None:
                return []
            steps, self._unclaimed = self._unclaimed, []
            return steps

    def _step_all(self) -> None:
        try:
            self._admit()
            running = [self._requests[key] for key in self._active]
            prefilling = [request for request in running if self._unfilled(request)]
            prefilling = self.prefixes.fillable(prefilling, running)
            ready = [request for request in running if not self._unfilled(request)]
            if ready:
                self._decode(ready, chunks(prefilling, self.target.length, self.prefill_beside))
            elif prefilling:
                self._fill(chunks(prefilling, self.target.length, self.prefill_chunk))
                ready = [request for request in prefilling if not self._unfilled(request)]
                if ready:
                    self._decode(ready, [])
        except BaseException as error:
            self._end_all(error)
            raise

    def _end_all(self, error: BaseException) -> None:
        """Ends all rows; `generate` and `stream` of other threads raise the error."""
        reason = error if isinstance(error, Exception) else RedwoodError("its step was interrupted")
        for key in list(self._active):
            request = self._requests[key]
            request.failed = True
            try:
                self._end(key)
                if request.inbox is not None:
                    request.inbox.append(request.fail(reason))
            except Exception:  # the others' rows are to be freed all the same
                _log.exception("a row could not be given back")
        for key in self._waiting:  # those that were just being admitted
            self.prefixes.give_back(self._requests[key])
        if isinstance(error, Exception):  # memory may be what was missing
            self.prefixes.forget()
            for model in draft_models(self.drafter):
                model.clear()

    def _admit(self) -> None:
        """Gives rows to the waiting requests that the scheduler admits."""
        self._end_dropped()
        self._sort_in()
        waiting = [self._requests[key] for key in self._waiting]
        running = [self._requests[key] for key in self._active]
        for _ in range(self.prefixes.admit(waiting, running, self.max_rows, self.kv_tokens)):
            self._active.append(self._waiting.popleft())

    def _unfilled(self, request: Request) -> bool:
        return self.target.length(request.row) < len(request.context.token_ids) - 1

    def _clock(self, requests: Sequence[Request]) -> Clock:
        """Stages end when the device has done what was launched in them."""
        return Clock([request.stats for request in requests], partial(wait_for, self.target.device))

    def _fill(self, parts: Sequence[tuple[Request, Nodes]]) -> None:
        """Prefills chunks of prompts, while no row decodes."""
        clock = self._clock([request for request, _ in parts])
        self.target.extend([nodes for _, nodes in parts])
        self.target.commit([_whole(nodes) for _, nodes in parts])
        clock.record_stage("prefill")

    def _decode(self, ready: Sequence[Request], parts: Sequence[tuple[Request, Nodes]]) -> None:
        """One step of prefilled rows, and chunks of other prompts beside them."""
        clock = self._clock(ready)
        drafts = self._draft(ready, clock)
        scored = self._extend(drafts, parts, clock)
        accepted, verify_s = self._verify(drafts, scored, clock)
        steps, commit_s = self._commit(accepted, parts, clock)
        for request, _ in parts:
            request.stats.seconds["prefill"] += scored.seconds
        if self.planner is not None and drafts.plan is not None and len(steps) == len(ready):
            counts = [len(step.token_ids) for _, step in steps]
            contexts = [request.context for request in ready]
            target_s = scored.seconds if scored.usual and not parts else None
            self.planner.end(drafts.plan, contexts, counts, target_s, verify_s + commit_s)
        for request, step in steps:
            self._give(request, step)
        clock.record_stage("other")

    def _draft(self, ready: Sequence[Request], clock: Clock) -> Drafts:
        """A tree for every row."""
        free = [self._free_slots(request) for request in ready]
        return draft(ready, free, self.drafter, self.planner, self.budget, clock)

    def _extend(
        self, drafts: Drafts, parts: Sequence[tuple[Request, Nodes]], clock: Clock
    ) -> Scored:
        """One forward of the target over all trees and prefill chunks."""
        nodes = [
            Nodes(request.row, tree.token_list, tree.parent_list)
            for request, tree in zip(drafts.requests, drafts.trees, strict=True)
        ]
        before = recordings_of(self.target)
        logits = self.target.extend([*nodes, *(nodes for _, nodes in parts)])
        usual = recordings_of(self.target) == before  # a graph is recorded once
        return Scored(logits, clock.record_stage("target" if usual else "prefill"), usual)

    def _verify(self, drafts: Drafts, scored: Scored, clock: Clock) -> tuple[list[Accepted], float]:
        """The path that each row keeps, and the seconds it took; a row that fails ends alone."""
        accepted, observers = [], observers_of(self.drafter)
        each = zip(drafts.requests, drafts.trees, scored.logits, strict=False)
        for request, tree, logits in each:
            try:
                rows = PathRows(logits, tree, request.context.params, request.context.history)
                for part in observers:
                    observe(part, request.context, tree, rows)
                kept = verify_rows(request.context, tree, rows)
                accepted.append(Accepted(request, tree, rows, kept))
            except Exception as error:
                self._give(request, request.fail(error))
        return accepted, clock.record_stage("verify")

    def _commit(
        self, accepted: Sequence[Accepted], parts: Sequence[tuple[Request, Nodes]], clock: Clock
    ) -> tuple[list[tuple[Request, Step]], float]:
        """Keeps the accepted slots; the step of each request, and the seconds it took."""
        self.target.commit(
            [AcceptedPath(each.request.row, each.kept.nodes) for each in accepted]
            + [_whole(nodes) for _, nodes in parts]
        )
        steps = []
        for request, tree, rows, kept in accepted:
            try:
                steps.append((request, request.advance(tree, kept, rows, self.eos_ids)))
            except Exception as error:
                steps.append((request, request.fail(error)))
        return steps, clock.record_stage("other")

    def _give(self, request: Request, step: Step) -> None:
        """Hands a step to whom it belongs, and ends the request if it was the last."""
        (self._unclaimed if request.inbox is None else request.inbox).append(step)
        if step.finish_reason is not None:
            self._end(step.request)

    def _free_slots(self, request: Request) -> int:
        """Nodes that fit; none is drafted for a last token, nor where the caller wants none."""
        free = self.target.capacity - self.target.length(request.row)
        wanted = request.max_new_tokens > 1 and request.context.params.speculate
        return max(1, free) if wanted else 1


def _whole(nodes: Nodes) -> AcceptedPath:
    return AcceptedPath(nodes.row, range(len(nodes.token_ids)))
