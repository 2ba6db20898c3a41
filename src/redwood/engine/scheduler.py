"""The scheduler: requests are admitted in order of arrival, prompts read in chunks.

Also PyTorch's number of threads while a backend computes with its own.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from threading import RLock, get_ident

import torch

from redwood.backends.base import Backend, Nodes
from redwood.drafters.base import (
    Drafter,
    ModelDrafter,
    NgramDrafter,
    NoDrafter,
    draft_models,
    parts_of,
)
from redwood.engine.request import Request


def admitted(
    waiting: Iterable[Request], running: Sequence[Request], max_rows: int, kv_tokens: int | None
) -> list[Request]:
    """Returns the waiting requests that are admitted, in order of arrival.

    Args:
        kv_tokens: most slots that all rows together may need; None: no limit.
    """
    joined: list[Request] = []
    used = sum(request.most_tokens for request in running)
    for request in waiting:
        used += request.most_tokens
        full = kv_tokens is not None and used > kv_tokens
        if full or len(running) + len(joined) >= max_rows:
            break
        joined.append(request)
    return joined


def extra_tokens(target: Backend, drafter: Drafter, tokens: int) -> int:
    """Returns what rows of so many tokens take beside keys and values, as tokens: states."""
    extra = each = 0
    for backend in (target, *(each.backend for each in draft_models(drafter))):
        size = int(getattr(backend, "token_bytes", None) or 0)
        each += size
        row_bytes: Callable[[int], int] | None = getattr(backend, "row_bytes", None)
        if row_bytes is not None:
            extra += row_bytes(tokens) - tokens * size
    return -(-extra // max(1, each))


def chunks(
    prefilling: Iterable[Request], length: Callable[[int], int], budget: int
) -> list[tuple[Request, Nodes]]:
    """Returns the next prefill chunks, those of prompts with least to read first.

    A prompt gains `budget` tokens on the others with each chunk that it is passed over, so that
    those that come later and are shorter do not keep it waiting for ever. Prompts that come to
    their end are read without parts of others, so that their first token need not wait for these.
    The last token of a prompt is left out: it is the root of the first tree.

    Args:
        length: tokens in place, by row.
        budget: tokens of all chunks together.
    """

    def left(request: Request) -> int:
        return len(request.context.token_ids) - 1 - length(request.row)

    made: list[tuple[Request, Nodes]] = []
    room, ends = budget, False
    for request in sorted(prefilling, key=lambda r: left(r) - budget * r.skipped):
        count = left(request)
        if not room or count > room and ends:
            request.skipped += 1
        elif count:
            done = length(request.row)
            part = request.context.token_ids[done : done + min(room, count)]
            made.append((request, Nodes(request.row, part, num_logits=0)))
            room -= len(part)
            request.skipped, ends = 0, ends or len(part) == count
    return made


@contextmanager
def one_pool(target: Backend, drafter: Drafter) -> Iterator[None]:
    """Keeps PyTorch to one thread where the target, and what drafts, compute with their own.

    Its threads spin for a while after each small operation, on processors that the next pass needs:
    on two cores, with a draft model, that costs a fifth of the speed. PyTorch keeps the number by
    thread and for threads to come: each thread gets it back after the last of its blocks.
    """
    if not (_owns(target) and all(map(_quiet, parts_of(drafter)))):
        yield
        return
    thread = get_ident()
    try:
        _pools.enter(thread)
        yield
    finally:
        _pools.leave(thread)


class _Pools:
    """The blocks of `one_pool` under way, by thread, and PyTorch's threads outside of them."""

    def __init__(self) -> None:
        self._lock = RLock()
        self._blocks: Counter[int] = Counter()
        self._usual = 1

    def enter(self, thread: int) -> None:
        with self._lock:
            if not self._blocks:
                self._usual = torch.get_num_threads()
            self._blocks[thread] += 1
            torch.set_num_threads(1)

    def leave(self, thread: int) -> None:
        with self._lock:
            if thread not in self._blocks:  # interrupted before it was noted
                return
            self._blocks[thread] -= 1
            if self._blocks[thread] <= 0:
                del self._blocks[thread]
                torch.set_num_threads(self._usual)


_pools = _Pools()
if hasattr(os, "register_at_fork"):  # the threads of these blocks are not in the child
    os.register_at_fork(after_in_child=_pools.__init__)  # type: ignore[misc]


def _owns(backend: Backend) -> bool:
    return bool(getattr(backend, "own_threads", False))


def _quiet(drafter: Drafter) -> bool:
    """Whether a drafter needs none of PyTorch's threads; others than ours may."""
    if isinstance(drafter, ModelDrafter):
        return _owns(drafter.backend)
    return isinstance(drafter, NoDrafter | NgramDrafter)
