"""The index of prompt and output, and the candidate tree grown from it."""

from __future__ import annotations

import random
from collections import Counter

from redwood.algorithms.sssd import DECAYS, PROMPT_WEIGHT, Candidate, TextIndex, candidate_tree


def _paths(tree: list[Candidate]) -> list[tuple[int, ...]]:
    paths: list[tuple[int, ...]] = [()]
    for candidate in tree:
        paths.append((*paths[candidate.parent], candidate.token_id))
    return paths[1:]


def test_the_only_continuation_is_followed_to_the_end_of_the_text() -> None:
    text = [1, 2, 3, 4, 5, 6, 7, 1, 2]
    tree = candidate_tree(TextIndex(text), text[-4:], 100)
    assert _paths(tree)[-1][:5] == (3, 4, 5, 6, 7)


def test_nothing_is_drafted_for_a_new_token_or_a_budget_of_one() -> None:
    assert candidate_tree(TextIndex([1, 2, 3]), [3], 10) == []
    assert candidate_tree(TextIndex([1, 2, 1]), [1], 1) == []
    assert candidate_tree(TextIndex(), [], 10) == []


def test_longer_matches_come_first() -> None:
    # After (7, 8) came 1; after 8 alone came 2, twice.
    text = [7, 8, 1, 0, 5, 8, 2, 0, 6, 8, 2, 0, 7, 8]
    tree = candidate_tree(TextIndex(text), text[-2:], 3)
    assert tree[0].token_id == 1 and tree[1].token_id in (0, 2)


def test_priorities_are_the_published_ones() -> None:
    text = [1, 2, 9, 1, 3, 9, 1, 2, 8, 1]
    tree = candidate_tree(TextIndex(text), [1], 4)
    by_path = dict(zip(_paths(tree), tree, strict=True))
    assert abs(by_path[(2,)].priority - PROMPT_WEIGHT * 2 / 3) < 1e-12
    assert abs(by_path[(2, 9)].priority - PROMPT_WEIGHT * 2 / 3 * DECAYS[0] * 1 / 2) < 1e-12


def test_a_node_found_by_two_match_lengths_is_one_node() -> None:
    text = [4, 5, 6, 4, 5, 6, 4, 5]
    tree = candidate_tree(TextIndex(text), text[-4:], 50)
    assert len(set(_paths(tree))) == len(tree)


def test_branches_and_budget_are_bounded() -> None:
    rng = random.Random(0)
    text = [rng.randrange(6) for _ in range(400)]
    for budget in (1, 2, 7, 40):
        tree = candidate_tree(TextIndex(text), text[-4:], budget, max_branch=2)
        assert len(tree) <= max(0, budget - 1)
        assert all(c.parent <= i for i, c in enumerate(tree))
        widths = Counter(c.parent for c in tree)
        assert max(widths.values(), default=0) <= 2


def test_growing_by_tokens_equals_building_at_once_and_the_trie_of_the_paper() -> None:
    rng = random.Random(1)
    for _ in range(30):
        text = [rng.randrange(4) for _ in range(rng.randint(1, 60))]
        grown = TextIndex()
        for token in text:
            grown.extend([token])
        once = TextIndex(text)
        assert candidate_tree(grown, text[-4:], 30) == candidate_tree(once, text[-4:], 30)
        # Counts are those of a trie of all windows: occurrences of the context that go on.
        for length, places in once.matches(text[-4:]):
            context = text[-length:]
            counts = Counter(
                text[i + length]
                for i in range(len(text) - length)
                if text[i : i + length] == context
            )
            assert Counter({t: len(p) for t, p in once.followers(places).items()}) == counts
