"""N-gram drafts from the text, from a datastore, and from both in one tree."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from datastore_kit import TOKENIZER, Words, store_of
from redwood.algorithms.sssd import candidate_tree
from redwood.datastore import create
from redwood.datastore.search import look_up
from redwood.drafters.base import NgramDrafter, NoDrafter, UnionDrafter, attach, join_drafters
from redwood.drafters.context import Context
from redwood.drafters.ngram import open_datastore_drafter
from redwood.errors import ArgumentError, DatastoreError, TokenizerMismatchError
from redwood.sampling import History, SamplingParams
from redwood.tree import TokenTree

STORED = [[1, 2, 3, 4, 5, 6], [1, 2, 9, 9]]


def _context(text: list[int], key: int = 1, vocab_size: int = 300, **params: Any) -> Context:
    made = SamplingParams(**{"temperature": 0.0, **params})
    return Context(key, list(text), made, History(text), vocab_size, np.random.default_rng(key))


def _paths(tree: TokenTree) -> set[tuple[int, ...]]:
    return {tuple(tree.token_list[n] for n in tree.path(node)[1:]) for node in range(1, len(tree))}


def test_a_datastore_gives_what_the_text_has_not(tmp_path: Path) -> None:
    store = store_of(tmp_path / "s", STORED)
    (tree,) = NgramDrafter(datastore=store).propose([_context([8, 1, 2])], [8])
    assert {(3,), (3, 4), (3, 4, 5), (9,)} <= _paths(tree)
    assert NgramDrafter().propose([_context([8, 1, 2])], [8])[0].token_list == [2]


def test_both_sources_fill_one_tree_by_their_chances(tmp_path: Path) -> None:
    store = store_of(tmp_path / "s", STORED)
    text = [1, 2, 7, 7, 7, 1, 2]
    joined = NgramDrafter(datastore=store)
    (tree,) = joined.propose([_context(text)], [7])
    assert {(7,), (3,)} <= _paths(tree) and len(tree) == 7
    assert tree.estimates is not None and list(tree.estimates) == sorted(tree.estimates)[::-1]
    (alone,) = NgramDrafter(datastore=store, own_text=False).propose([_context(text)], [20])
    assert all(path[0] in (3, 9) for path in _paths(alone))


@pytest.mark.parametrize("budget", [1, 2, 5, 30])
def test_budgets_are_kept_and_estimates_fall_along_paths(tmp_path: Path, budget: int) -> None:
    rng = np.random.default_rng(0)
    store = store_of(tmp_path / "s", rng.integers(0, 6, (30, 40)).tolist())
    for own_text in (True, False):
        drafter = NgramDrafter(3, datastore=store, own_text=own_text)
        context = _context(rng.integers(0, 6, 50).tolist())
        for _ in range(20):
            (tree,) = drafter.propose([context], [budget])
            assert 1 <= len(tree) <= budget and tree.token_list[0] == context.token_ids[-1]
            assert all(len(children) <= 3 for children in tree.children)
            for node, parent in enumerate(tree.parent_list[1:], start=1):
                assert tree.estimates is not None
                assert tree.estimates[node] <= tree.estimates[parent]
            context.token_ids += rng.integers(0, 6, rng.integers(1, 4)).tolist()


def test_what_the_datastore_is_worth_is_learned(tmp_path: Path) -> None:
    """A store that is always wrong gives way; what is learned outlives the text."""
    store = store_of(tmp_path / "s", [[1, 2, 3, 4, 5]] * 60)
    drafter = NgramDrafter(datastore=store)
    context = _context([1, 2, 9, 1, 2, 9, 1, 2])
    (tree,) = drafter.propose([context], [6])
    believed = dict(zip(tree.token_list, tree.estimates or (), strict=True))[3]
    for _ in range(30):
        drafter.propose([context], [4])
        context.token_ids += [9, 1, 2]
    assert drafter.propose([context], [2])[0].token_list[1] == 9
    drafter.release(1)
    fresh = _context([8, 1, 2, 9, 1, 2], key=2)
    (tree,) = drafter.propose([fresh], [6])
    chances = dict(zip(tree.token_list, tree.estimates or (), strict=True))
    assert chances.get(3, 0.0) < min(believed, chances[9])


def test_a_text_that_may_follow_its_seed_alone_gets_published_priorities(tmp_path: Path) -> None:
    store = store_of(tmp_path / "s", STORED * 3)
    live = store_of(tmp_path / "live", [[1, 2, 5, 5, 5]])
    drafter = NgramDrafter(datastore=store)
    text = [1, 2, 7, 7, 1, 2]
    seeded = {"temperature": 0.8, "seed": 1, "verifier": "traversal"}
    trees = []
    for key in range(3):
        drafter.attach(key, [live])
        context = _context(text, key, **seeded)
        assert context.unsteered
        (tree,) = drafter.propose([context], [9])
        trees.append((tree.token_list, tree.parent_list))
        drafter.propose([_context([*text, 3], 100 + key)], [9])  # others learn in between
    assert trees[0] == trees[1] == trees[2] and tree.estimates is None
    index = drafter._texts[0].index
    found = look_up(store.chunks, text[-4:]).token_lists()
    want = candidate_tree(index, text[-4:], 9, continuations=found)
    assert trees[0][0] == [2, *(c.token_id for c in want)]


def test_tokens_that_the_target_lacks_are_not_drafted(tmp_path: Path) -> None:
    store = store_of(tmp_path / "s", [[1, 2, 70_000], [1, 2, 299, 300]])
    drafter = NgramDrafter(datastore=store)
    (tree,) = drafter.propose([_context([1, 2])], [9])
    assert _paths(tree) == {(299,)}


def test_attached_stores_serve_one_request_until_its_release(tmp_path: Path) -> None:
    mine = store_of(tmp_path / "mine", [[1, 2, 50, 51]])
    drafter = NgramDrafter()
    union = UnionDrafter([NoDrafter(), drafter])
    attach(union, 1, [mine])
    attach(NoDrafter(), 1, [mine])  # nothing there that could
    one, other = _context([8, 1, 2], 1), _context([8, 1, 2], 2)
    trees = drafter.propose([one, other], [5, 5])
    assert _paths(trees[0]) == {(50,), (50, 51)} and _paths(trees[1]) == set()
    union.release(1)
    assert _paths(drafter.propose([one], [5])[0]) == set()


def test_ngrams_and_a_datastore_join_in_one_drafter(tmp_path: Path) -> None:
    store = store_of(tmp_path / "s", STORED)
    text, stored = NgramDrafter(), NgramDrafter(4, datastore=store, own_text=False)
    joined = join_drafters([stored, text])
    assert isinstance(joined, NgramDrafter)
    assert (joined.name, joined.max_branch, joined.datastores) == ("ngram+index", 5, (store,))
    assert joined.reliability is text.reliability, "what a profile teaches one, both know"
    assert (text.name, stored.name) == ("ngram", "index")
    both = join_drafters([stored, NgramDrafter(datastore=store, own_text=False)])
    assert isinstance(both, NgramDrafter) and not both.own_text
    assert both.datastores == (store,) and both.reliability is stored.reliability


def test_the_planner_sees_one_arm(tmp_path: Path) -> None:
    from redwood.planner.planner import arms_of

    store = store_of(tmp_path / "s", STORED)
    parts = [NgramDrafter(), NgramDrafter(datastore=store, own_text=False)]
    assert [arm.drafter.name for arm in arms_of(join_drafters(parts))] == ["none", "ngram+index"]

    class Mine:
        name, draws = "mine", False

        def propose(self, contexts: Any, budgets: Any) -> Any:
            return NoDrafter().propose(contexts, budgets)

        def release(self, key: int) -> None:
            return None

    joined = join_drafters([parts[0], Mine(), parts[1]])
    assert isinstance(joined, UnionDrafter)
    assert [arm.drafter.name for arm in arms_of(joined)] == [
        "none", "mine", "ngram+index", "mine+ngram+index",
    ]  # fmt: skip


def test_a_datastore_is_opened_for_the_tokenizer_of_the_target(tmp_path: Path) -> None:
    words = Words("a", "b", "c")
    create(tmp_path / "s", words, [[0, 1, 2]])
    drafter = open_datastore_drafter(tmp_path / "s", words)
    assert drafter.name == "index"
    assert _paths(drafter.propose([_context([0])], [5])[0]) == {(1,), (1, 2)}
    with pytest.raises(TokenizerMismatchError, match="another tokenizer"):
        open_datastore_drafter(tmp_path / "s", Words("a", "c", "b"))
    with pytest.raises(DatastoreError, match="is no datastore"):
        open_datastore_drafter(tmp_path / "absent", words)


def test_a_drafter_needs_something_to_draft_from(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="needs a datastore"):
        NgramDrafter(own_text=False)
    with pytest.raises(ArgumentError, match="max_branch"):
        NgramDrafter(0, datastore=create(tmp_path / "s", TOKENIZER))


@pytest.mark.parametrize(
    "params", [{}, {"temperature": 0.9, "seed": 3}, {"temperature": 0.9, "seed": 3, "top_p": 0.8}]
)
@pytest.mark.parametrize("budget", [None, 6])
def test_a_text_is_the_same_with_a_datastore_and_comes_in_fewer_steps(
    tmp_path: Path, tiny_model_folder: Path, params: dict[str, Any], budget: int | None
) -> None:
    import redwood

    prompt = [5, 9, 17, 33, 40]
    plain = redwood.load(tiny_model_folder)
    want = plain.generate(prompt, max_tokens=40, ignore_eos=True, **params)
    create(tmp_path / "s", plain.tokenizer, [[*prompt, *want.token_ids], [5, 9, 17, 33, 41, 7]])
    stored = open_datastore_drafter(tmp_path / "s", plain.tokenizer)
    engine = redwood.load(tiny_model_folder, [NgramDrafter(), stored], budget=budget)
    assert engine.drafter.name == "ngram+index"
    made = engine.generate(prompt, max_tokens=40, ignore_eos=True, **params)
    assert made.token_ids == want.token_ids
    if budget is not None:  # the planner may find that no draft pays on a tiny model
        assert made.stats.target_passes < 0.5 * len(want.token_ids)
