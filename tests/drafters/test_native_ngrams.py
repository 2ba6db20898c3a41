"""The compiled index of a text against the one written in Python: equal in all it says."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from redwood.algorithms import sssd
from redwood.algorithms.sssd import TextIndex, candidate_tree

native: Any = pytest.importorskip("redwood._native", reason="installed without a compiler")


def indexes(text: list[int]) -> tuple[TextIndex, Any]:
    compiled = native.TextIndex()
    half = len(text) // 2
    compiled.extend(text[:half])
    compiled.extend(text[half:])
    return TextIndex(text), compiled


texts = st.integers(1, 4).flatmap(
    lambda most: st.lists(st.integers(0, most) | st.just(2**32 - 1), max_size=60)
)


@settings(max_examples=300, deadline=None)
@given(
    text=texts,
    other=st.lists(st.integers(0, 4), max_size=6),
    size=st.integers(0, 40),
)
def test_it_finds_the_same_and_grows_the_same_trees(
    text: list[int], other: list[int], size: int
) -> None:
    own, compiled = indexes(text)
    assert len(own) == len(compiled)
    for suffix in (text[-6:], text[-2:], other):
        found = own.matches(suffix)
        assert compiled.matches(suffix) == found
        for _, places in found:
            after = compiled.followers(places)
            assert after == own.followers(places) and [*after] == [*own.followers(places)]
        assert candidate_tree(compiled, suffix, size) == candidate_tree(own, suffix, size)


def test_as_many_places_as_count_are_found_in_long_texts() -> None:
    rng = random.Random(5)
    text = [rng.choice([1, 1, 1, 2]) for _ in range(3000)]
    own, compiled = indexes(text)
    assert compiled.matches(text[-4:]) == own.matches(text[-4:])
    assert max(len(places) for _, places in compiled.matches(text[-4:])) == 128


def test_what_cannot_be_is_refused() -> None:
    index = native.TextIndex()
    for token in (-1, 2**32):
        with pytest.raises(ValueError, match="a token must be"):
            index.extend([1, token])
        with pytest.raises(ValueError, match="a token must be"):
            index.matches([token])
    assert len(index) == 0
    with pytest.raises(ValueError, match="below 0"):
        index.followers([-1])
    assert index.followers([7]) == {}


def test_drafters_use_it_where_it_was_built() -> None:
    assert sssd.compiled and isinstance(sssd.text_index(), native.TextIndex)
