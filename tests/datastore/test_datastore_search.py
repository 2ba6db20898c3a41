"""Searching finds what a walk over the texts finds, and samples it fairly."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datastore_kit import store_of
from redwood.datastore.chunk import as_values, suffix_array
from redwood.datastore.search import Continuations, look_up

Texts = list[list[int]]


def _followers(documents: Texts, gram: list[int], depth: int) -> Counter[tuple[int, ...]]:
    """Continuations of every place where a gram stands in a document, and goes on."""
    found = Counter[tuple[int, ...]]()
    for document in documents:
        for i in range(len(document) - len(gram)):
            if document[i : i + len(gram)] == gram:
                found[tuple(document[i + len(gram) : i + len(gram) + depth])] += 1
    return found


def _of_length(found: Continuations, length: int) -> Counter[tuple[int, ...]]:
    return Counter(
        tuple(row) for match, rows in found.by_match() if match == length for row in rows
    )


@given(st.lists(st.integers(0, 300) | st.integers(65_000, 66_000), min_size=1, max_size=60))
def test_suffixes_are_sorted_as_lists_are(tokens: list[int]) -> None:
    values = as_values(tokens)
    listed = values.tolist()
    assert suffix_array(values).tolist() == sorted(range(len(listed)), key=lambda i: listed[i:])


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.lists(st.integers(0, 3), max_size=15), max_size=12),
    st.lists(st.integers(0, 4), min_size=1, max_size=6),
    st.sampled_from([16, 40, 1000]),
)
def test_a_search_finds_what_a_walk_over_the_texts_finds(
    documents: Texts, suffix: list[int], chunk_tokens: int
) -> None:
    with TemporaryDirectory() as folder:
        store = store_of(Path(folder, "s"), documents, chunk_tokens)
        found = look_up(store.chunks, suffix, most_places=10**6, enough=10**9, depth=3)
        for length in range(1, 5):
            want = Counter[tuple[int, ...]]()
            if length <= len(suffix):
                want = _followers(documents, suffix[-length:], 3)
            assert _of_length(found, length) == want


def test_shorter_contexts_are_looked_up_until_there_is_enough(tmp_path: Path) -> None:
    store = store_of(tmp_path / "s", [[1, 2, 3, 4, 5]] * 10 + [[9, 3, 4, 6]] * 10 + [[4, 7]] * 10)
    lengths = [
        [length for length, _ in look_up(store.chunks, [1, 2, 3, 4], enough=enough).by_match()]
        for enough in (1, 10, 11, 31, 1000)
    ]
    # Found: 10 by four tokens, the same 10 by three, 20 by two, 30 by one.
    assert lengths == [[4], [4], [4, 3], [4, 3, 2], [4, 3, 2, 1]]
    assert look_up(store.chunks, [8, 8, 8, 8]).by_match() == []
    assert look_up(store.chunks, []).by_match() == []
    assert look_up([], [1]).by_match() == []


@pytest.mark.parametrize("most", [1, 7, 100, 150])
def test_a_sample_is_a_fair_share_of_all_chunks(tmp_path: Path, most: int) -> None:
    """Also of fewer than twice as many places, where a whole step would take the first ones."""
    rng = random.Random(0)
    documents = [[1, 2 if rng.random() < 0.3 else 3] for _ in range(190)]
    store = store_of(tmp_path / "s", documents, chunk_tokens=90)
    assert len(store.chunks) > 5
    rows = look_up(store.chunks, [1], most_places=most).token_lists()
    assert len(rows) == most
    total = sum(document[1] == 2 for document in documents)
    share = sum(row[0] == 2 for row in rows)
    assert abs(share - total * most / 190) <= len(store.chunks)  # a rounding for every chunk


def test_nothing_runs_across_the_end_of_a_document(tmp_path: Path) -> None:
    store = store_of(tmp_path / "s", [[1, 2], [3, 4], [2, 3, 5]])
    assert look_up(store.chunks, [1]).token_lists() == [[2]]
    assert look_up(store.chunks, [1, 2]).token_lists() == [[3, 5]]  # of [2]: [1, 2] is an end
    assert look_up(store.chunks, [2, 3]).token_lists() == [[5], [4], [5]]
    assert look_up(store.chunks, [4]).token_lists() == []


def test_continuations_end_before_tokens_that_the_target_lacks(tmp_path: Path) -> None:
    store = store_of(tmp_path / "s", [[1, 2, 70_000, 3], [1, 299, 300]])
    found = look_up(store.chunks, [1], vocab_size=300)
    assert sorted(found.token_lists()) == [[2], [299]]
    assert sorted(look_up(store.chunks, [1]).token_lists()) == [[2, 70_000, 3], [299, 300]]


def test_damaged_tables_find_nonsense_at_worst(tmp_path: Path) -> None:
    """A chunk that went bad under an open datastore must not end the process."""
    rng = np.random.default_rng(0)
    store = store_of(tmp_path / "s", [[1, 2, 3, 1, 2, 4]] * 20)
    file, chunk = store.chunks[0].path, store.chunks[0]
    whole = np.frombuffer(file.read_bytes(), np.uint8)
    for _ in range(60):
        damaged = whole.copy()
        places = rng.integers(64, len(whole), 40)
        damaged[places] = rng.integers(0, 256, 40)
        with file.open("r+b") as handle:  # in place: the map shows it
            handle.write(damaged.tobytes())
        for gram in ([2], [3, 4], [2, 3, 4]):
            first, end = chunk.find(gram)
            assert 0 <= first <= end <= len(chunk)
        look_up([chunk], [0, 1, 2, 3], vocab_size=10)
