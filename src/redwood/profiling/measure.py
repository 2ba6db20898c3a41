"""Measures the forwards of one backend, by rows, nodes and context, for a `LatencyModel`.

All kinds of forward are interleaved in changing order on rows that stay open, so that a slow second
of the machine affects all of them. Tokens are random: no prompt is needed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from time import perf_counter
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from redwood.backends.base import Backend, Nodes
from redwood.backends.rows import fill
from redwood.errors import ArgumentError
from redwood.profiling.latency import LatencyModel, LatencyPoint

QUICK_NODES = (1, 2, 4, 8, 16)
"""Unless a backend has `quick_nodes`: sizes for forwards that take seconds."""
_QUICK_REPEATS, _QUICK_SECONDS = 9, 3.0
_FINEST_MS = 1e-3  # a coarse clock may say 0


class Kind(NamedTuple):
    """A forward to time: `nodes` new nodes in each of `rows` rows of `context` tokens."""

    rows: int
    nodes: int
    context: int


def measure_curve(
    backend: Backend,
    kinds: Sequence[Kind],
    *,
    repeats: int,
    seconds: float,
    on_round: Callable[[int], None] | None = None,
) -> LatencyModel:
    """Returns the latency model of the medians of timed forwards.

    Kinds that exceed the backend's capacity, or that the time limit did not reach, are skipped.

    Args:
        kinds: what to time, the most expensive last; the first must have one row and one node.
        repeats: forwards of each kind.
        seconds: time limit for starting forwards, from when the rows are filled; the first always
            runs.
        on_round: called with the number of rounds done.

    Raises:
        ArgumentError: no kinds, another first kind, repeats below 1.
    """
    kinds = [k for k in dict.fromkeys(kinds) if k.context + k.nodes <= backend.capacity]
    if not kinds or kinds[0][:2] != (1, 1) or repeats < 1:
        raise ArgumentError("timing needs repeats, and one row with one node as its first kind")
    tokens = random_tokens(backend, max(k.context + k.nodes for k in kinds))
    times: dict[Kind, list[float]] = {kind: [] for kind in kinds}
    with filled_rows(backend, kinds, tokens) as rows:
        timed_forward(backend, kinds[0], rows, tokens)  # the first one warms up
        end = perf_counter() + seconds
        for turn in range(repeats):
            for kind in _order(kinds, turn):
                if perf_counter() < end or not times[kinds[0]]:
                    times[kind].append(timed_forward(backend, kind, rows, tokens)[0])
            if on_round is not None:
                on_round(turn + 1)
    return LatencyModel(tuple(_point(kind, listed) for kind, listed in times.items() if listed))


def quick_curve(backend: Backend, context: int = 128) -> LatencyModel:
    """Returns a rough latency model of one row, in about 4 seconds at most.

    1 to 16 nodes behind `context` tokens, or as many as fit; without a term for the context. Where
    weights are streamed in every forward, it takes a few forwards.
    """
    slow: Sequence[int] | None = getattr(backend, "quick_nodes", None)
    if slow:
        kinds = [Kind(1, nodes, 0) for nodes in slow]
        return measure_curve(backend, kinds, repeats=2, seconds=math.inf)
    context = max(0, min(context, backend.capacity - QUICK_NODES[-1]))
    kinds = [Kind(1, nodes, context) for nodes in QUICK_NODES]
    return measure_curve(backend, kinds, repeats=_QUICK_REPEATS, seconds=_QUICK_SECONDS)


def fill_seconds(backend: Backend, context: int) -> float:
    """Returns the prefill cost of `context` tokens, in seconds."""
    tokens = random_tokens(backend, context)
    for _ in range(2):  # the first forward may record a graph, the second uses it
        before = recordings_of(backend)
        row = backend.open()
        try:
            start = perf_counter()
            fill(backend, row, tokens)
            wait_for(backend.device)
            took = perf_counter() - start
        finally:
            backend.release(row)
        if recordings_of(backend) == before:
            break
    return took


def wait_for(what: Tensor | torch.device) -> None:
    """Waits for the device of a tensor, or for a device.

    Launches on a GPU are asynchronous: a time is valid only after synchronisation.
    """
    device = what.device if isinstance(what, Tensor) else what
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def recordings_of(*backends: Backend) -> int:
    """Returns how many graphs these have recorded; a forward that records one takes longer."""
    return sum(getattr(backend, "recordings", 0) for backend in backends)


def random_tokens(backend: Backend, count: int) -> list[int]:
    """Returns so many tokens of the vocabulary, the same ones in every call."""
    drawn = np.random.default_rng(0).integers(0, backend.vocab_size, count)
    listed: list[int] = drawn.tolist()
    return listed


def _order(kinds: Sequence[Kind], turn: int) -> list[Kind]:
    """As given in the first round, shuffled in later ones."""
    if turn == 0:
        return list(kinds)
    return [kinds[i] for i in np.random.default_rng(turn).permutation(len(kinds))]


@contextmanager
def filled_rows(
    backend: Backend, kinds: Sequence[Kind], tokens: Sequence[int]
) -> Iterator[dict[int, list[int]]]:
    """Yields prefilled rows by context, as many as the kinds need, and releases them in the end."""
    rows: dict[int, list[int]] = {kind.context: [] for kind in kinds}
    try:
        for context, opened in rows.items():
            for _ in range(max(kind.rows for kind in kinds if kind.context == context)):
                opened.append(backend.open())
                fill(backend, opened[-1], tokens[:context])
        yield rows
    finally:
        for row in (row for opened in rows.values() for row in opened):
            backend.release(row)


def timed_forward(
    backend: Backend, kind: Kind, rows: dict[int, list[int]], tokens: Sequence[int]
) -> tuple[float, Tensor]:
    """Returns the milliseconds of one forward, and its first logits [nodes, V].

    The rows, from `filled_rows`, are truncated after it.
    """
    used = rows[kind.context][: kind.rows]
    new = tokens[kind.context : kind.context + kind.nodes]
    entries = [Nodes(row, new) for row in used]
    for _ in range(2):  # the first forward may record a graph, the second uses it
        before = recordings_of(backend)
        start = perf_counter()
        logits, *_ = backend.extend(entries)
        wait_for(backend.device)
        took = 1000.0 * (perf_counter() - start)
        for row in used:
            backend.truncate(row, kind.context)
        if recordings_of(backend) == before:
            break
    return took, logits


def _point(kind: Kind, times: Sequence[float]) -> LatencyPoint:
    low, middle, high = (max(float(ms), _FINEST_MS) for ms in np.percentile(times, [25, 50, 75]))
    return LatencyPoint(*kind, ms=middle, low=low, high=high)
