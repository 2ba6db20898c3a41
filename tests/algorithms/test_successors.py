"""The successor table: by hand, in bounded memory, and the compiled one against the reference."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from redwood.algorithms.successors import ENTRY, LEAST_BYTES, SuccessorTable, successor_table
from redwood.errors import ArgumentError

Rows = tuple[NDArray[np.int32], NDArray[np.float32]]


def row(*pairs: tuple[int, float]) -> Rows:
    ids = np.array([[token for token, _ in pairs]], np.int32)
    return ids, np.array([[prob for _, prob in pairs]], np.float32)


@pytest.fixture(params=["reference", "compiled"])
def make(request: pytest.FixtureRequest) -> Callable[..., SuccessorTable]:
    if request.param == "reference":
        return SuccessorTable
    return pytest.importorskip("redwood._native").SuccessorTable


def test_a_row_is_found_by_the_last_one_to_three_tokens(
    make: Callable[..., SuccessorTable],
) -> None:
    table = make(LEAST_BYTES)
    table.learn([9, 5, 6], [7], [-1], *row((1, 0.5), (2, 0.25)))
    best = [(1, 0.5), (2, 0.25)]
    assert table.find([5, 6, 7]) == [(3, best), (2, best), (1, best)]
    assert table.find([0, 6, 7]) == [(2, best), (1, best)]
    assert table.find([7]) == [(1, best)]
    assert table.find([6]) == [] and table.find([]) == []
    assert len(table) == 3 and table.rows == 1


def test_keys_follow_the_paths_of_a_tree(make: Callable[..., SuccessorTable]) -> None:
    table = make(LEAST_BYTES)
    ids = np.array([[10], [11], [12], [13]], np.int32)
    table.learn([1], [2, 3, 4, 5], [-1, 0, 0, 2], ids, np.ones((4, 1), np.float32))
    assert table.find([1, 2, 3])[0] == (3, [(11, 1.0)])
    assert table.find([1, 2, 4])[0] == (3, [(12, 1.0)])
    assert table.find([2, 4, 5])[0] == (3, [(13, 1.0)])
    assert [length for length, _ in table.find([3, 4, 5])] == [2, 1], "siblings are no path"


def test_the_newest_row_has_a_weight_of_two_fifths(make: Callable[..., SuccessorTable]) -> None:
    table = make(LEAST_BYTES)
    table.learn([], [7], [-1], *row((1, 0.5), (2, 0.5)))
    table.learn([], [7], [-1], *row((3, 1.0), (2, 0.0)))
    ((_, found),) = table.find([7])
    assert dict(found) == pytest.approx({3: 0.4, 1: 0.3, 2: 0.3})
    assert [token for token, _ in found] == [3, 1, 2]


def test_what_cannot_be_is_refused(make: Callable[..., SuccessorTable]) -> None:
    table = make(LEAST_BYTES)
    good = row((1, 0.5))
    for tail, tokens, parents, rows in (
        ([], [7], [0], good),
        ([], [7], [-2], good),
        ([], [-1], [-1], good),
        ([2**32], [7], [-1], good),
        ([], [7, 8], [-1, 0], good),
        ([], [7], [-1], row(*((i, 0.1) for i in range(7)))),
    ):
        with pytest.raises(ValueError, match="token|row|parent"):
            table.learn(tail, tokens, parents, *rows)
    assert len(table) == 0 and table.rows == 0
    with pytest.raises(ValueError, match="512 KiB"):
        make(LEAST_BYTES - 1)
    with pytest.raises(ArgumentError, match="512 KiB"):
        successor_table(10)


@pytest.mark.parametrize("field", ["key", "rows", "probs"])
def test_entries_that_no_table_can_hold_are_refused_whole(
    make: Callable[..., SuccessorTable], field: str
) -> None:
    table = make(LEAST_BYTES)
    for token in range(4):
        table.learn([], [token], [-1], *row((1, 0.5), (2, 0.25)))
    entries = table.entries()
    entries.view(ENTRY)[2][field] = np.nan if field == "probs" else 0
    fresh = make(LEAST_BYTES)
    with pytest.raises(ValueError, match="no table can hold"):
        fresh.load(entries, 4)
    assert len(fresh) == 0


def test_the_compiled_table_is_the_reference_bit_for_bit_also_when_it_is_full() -> None:
    native = pytest.importorskip("redwood._native")
    rng = np.random.default_rng(1)
    tables = [native.SuccessorTable(2 * LEAST_BYTES), SuccessorTable(2 * LEAST_BYTES)]
    for _ in range(4000):
        n = int(rng.integers(1, 6))
        tokens = rng.integers(0, 30, n).tolist()
        parents = [int(rng.integers(-1, i)) if i else -1 for i in range(n)]
        ids = np.stack([rng.permutation(60)[:4] for _ in range(n)]).astype(np.int32)
        probs = rng.dirichlet([0.3] * 5, n)[:, :4].astype(np.float32)
        probs[rng.random(probs.shape) < 0.05] = 0.0
        probs = -np.sort(-probs, axis=1)
        tail = rng.integers(0, 30, int(rng.integers(0, 4))).tolist()
        for table in tables:
            table.learn(tail, tokens, parents, ids, probs)
    compiled, reference = tables
    assert compiled.nbytes == reference.nbytes == compiled.max_bytes
    assert compiled.rows == reference.rows
    entries = compiled.entries()
    assert (entries == reference.entries()).all()
    for _ in range(200):
        context = rng.integers(0, 30, 3).tolist()
        assert compiled.find(context) == reference.find(context)
    for fresh in (native.SuccessorTable(2 * LEAST_BYTES), SuccessorTable(2 * LEAST_BYTES)):
        fresh.load(entries, compiled.rows)
        assert (fresh.entries() == entries).all() and fresh.rows == compiled.rows
        fresh.clear()
        assert len(fresh) == 0 and fresh.nbytes == LEAST_BYTES
