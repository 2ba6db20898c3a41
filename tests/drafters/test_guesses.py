"""Guessed nodes spare passes of a draft model, and leave its trees bit for bit as they were."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from conftest import tiny_llama, tiny_tokenizer
from redwood.algorithms.specinfer import expansion_tree
from redwood.backends.base import Nodes
from redwood.backends.load import wrap_model
from redwood.backends.native.load import load_native
from redwood.drafters.base import ModelDrafter, NgramDrafter, UnionDrafter
from redwood.drafters.context import Context
from redwood.drafters.guesses import Continuations, Saying, Start, choose_guesses, guess_rates
from redwood.drafters.limits import Limits, ModelLimits
from redwood.errors import ArgumentError
from redwood.planner.budget import LevelBudget, StepBudget
from redwood.sampling import GumbelNoise, History, SamplingParams
from redwood.testing import TableBackend
from redwood.tree import TokenTree

VOCAB = 300
TEXT = [5, 9, 17, 5, 9, 17, 5, 9]
WIDE = expansion_tree([2, 2, 1, 1])
CHAIN = list(range(-1, 5))


def _context(key: int = 1, text: Sequence[int] = TEXT, **params: Any) -> Context:
    made = SamplingParams(**params)
    noise = GumbelNoise(1, VOCAB) if made.coupled and made.temperature else None
    return Context(key, list(text), made, History(text), VOCAB, np.random.default_rng(key), noise)


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("draft")
    tiny_llama(3, 1).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return load_native(Path(folder), None, threads=1)


def _same(tree: TokenTree, other: TokenTree) -> None:
    for name in ("token_list", "parent_list", "law_list", "draft_row_list", "estimates"):
        assert getattr(tree, name) == getattr(other, name), name
    for name in ("draft_probs", "draft_ids"):
        made, want = getattr(tree, name), getattr(other, name)
        assert (made is None) == (want is None) and (made is None or torch.equal(made, want)), name


def _guess_tree(rng: np.random.Generator, text: Sequence[int], tree: TokenTree) -> TokenTree:
    """Some of the true nodes below the last token, and some wrong ones."""
    tokens, parents = [text[-1]], [-1]
    place = {0: 0}
    for node, (token, parent) in enumerate(zip(tree.token_list, tree.parent_list, strict=True)):
        if node and parent in place and rng.random() < 0.7 and token not in tokens:
            place[node] = len(tokens)
            tokens.append(token)
            parents.append(place[parent])
    for _ in range(3):
        parents.append(int(rng.integers(len(tokens))))
        tokens.append(int(rng.integers(VOCAB)))
    return TokenTree.point(tokens, parents)


@pytest.mark.parametrize("shape", [CHAIN, WIDE, None])
@pytest.mark.parametrize(
    ("law", "params"),
    [
        ("point", {"temperature": 0.0}),
        ("point", {"temperature": 1.0}),
        ("without_replacement", {"temperature": 0.8}),
        ("with_replacement", {"temperature": 0.3}),
        ("without_replacement", {"temperature": 0.8, "seed": 1}),  # COUPLED
        (
            "without_replacement",
            {"temperature": 0.8, "seed": 1, "verifier": "traversal"},
        ),  # unsteered
        ("with_replacement", {"temperature": 0.8, "repetition_penalty": 1.3, "top_p": 0.9}),
    ],
)
def test_trees_are_bit_for_bit_those_without_guesses(
    native: Any, shape: list[int] | None, law: str, params: dict[str, Any]
) -> None:
    how: dict[str, Any] = {"tree": shape, "law": law, "width": 40}
    guessing, plain = ModelDrafter(native, **how), ModelDrafter(native, guesses=0, **how)
    rng, budget = np.random.default_rng(3), 12 if shape is None else len(shape)
    mine = [_context(1, **params), _context(2, [4], **params)]
    theirs = [_context(1, **params), _context(2, [4], **params)]
    last: list[TokenTree] = []
    for step in range(16):
        wanted = plain.propose(theirs, [budget, budget])
        # Every other step the truth itself is among the guesses.
        trees = {c.key: _guess_tree(rng, c.token_ids, t) for c, t in zip(mine, wanted, strict=True)}
        made = guessing.propose(mine, [budget, budget], Limits(guesses=trees if step % 2 else {}))
        for tree, want in zip(made, wanted, strict=True):
            _same(tree, want)
        for context, other, tree in zip(mine, theirs, made, strict=True):
            assert context.rng.bit_generator.state == other.rng.bit_generator.state
            path = tree.path(int(rng.integers(len(tree))))[1:]
            news = [tree.token_list[n] for n in path] + [int(rng.integers(VOCAB))]
            if step % 5 == 4:  # a text that goes on as it did before: guesses from memory
                news = TEXT[:5]
            context.token_ids += news
            other.token_ids += news
        last = made
    assert last and guessing.guesser.num_hits > 0
    assert guessing.num_passes <= plain.num_passes  # one is spared where both rows are right


def test_a_level_that_was_guessed_is_no_pass(native: Any) -> None:
    plain = ModelDrafter(native, CHAIN, law="point", guesses=0)
    (want,) = plain.propose([_context(text=[5, 9], temperature=0.0)], [6])
    assert plain.num_passes == 5  # the last node is not scored
    drafter = ModelDrafter(native, CHAIN, law="point", guesses=8)
    given = TokenTree.point(want.token_list, want.parent_list, [1.0] * 6)
    (tree,) = drafter.propose(
        [_context(text=[5, 9], temperature=0.0)], [6], Limits(guesses={1: given})
    )
    _same(tree, want)
    assert drafter.num_passes == 1
    assert (drafter.guesser.num_guesses, drafter.guesser.num_hits) == (4, 4)
    # A tree of another text's last token says nothing here.
    other = ModelDrafter(native, CHAIN, law="point")
    wrong = TokenTree.point([8, *want.token_list[1:]], want.parent_list)
    _same(
        other.propose([_context(text=[5, 9], temperature=0.0)], [6], Limits(guesses={1: wrong}))[0],
        want,
    )
    assert other.guesser.num_guesses == 0


def test_what_was_scored_already_is_not_scored_again(native: Any) -> None:
    """A bonus token that the draft model has scored, though the target's tree left it out."""
    drafter = ModelDrafter(native, CHAIN, law="point")
    context = _context(temperature=0.0)
    (tree,) = drafter.propose([context], [6])
    context.token_ids += tree.token_list[1:4]
    length = len(context.token_ids)
    for _ in range(2):  # the second time the same text comes again
        before = drafter.num_passes
        (made,) = drafter.propose([context], [6])
        (want,) = ModelDrafter(native, CHAIN, law="point").propose(
            [_context(text=context.token_ids, temperature=0.0)], [6]
        )
        assert made.token_list == want.token_list
        assert drafter.num_passes - before <= 5 and len(context.token_ids) == length


def test_near_the_end_of_a_row_nothing_is_guessed() -> None:
    for length in range(20, 32):
        text = [5, 9] * 16
        trees = []
        for guesses in (0, 8):
            backend = TableBackend(vocab_size=VOCAB, seed=0, capacity=32)
            drafter = ModelDrafter(backend, CHAIN, law="point", guesses=guesses)
            context = _context(text=text[:length], temperature=0.0)
            for _ in range(2):
                (tree,) = drafter.propose([context], [6])
            trees.append(tree)
        _same(*trees)


def test_texts_of_their_seed_alone_are_guessed_only_where_no_sum_changes(native: Any) -> None:
    unsteered = _context(temperature=0.8, seed=1, verifier="traversal")
    assert unsteered.unsteered
    eager = ModelDrafter(wrap_model(tiny_llama(3, 1)))
    assert not eager.guesser.serves(unsteered) and eager.guesser.serves(_context(temperature=0.8))
    assert ModelDrafter(native).guesser.serves(unsteered)


class _Counting(TableBackend):
    """Counts the nodes of every pass."""

    def __init__(self) -> None:
        super().__init__(vocab_size=VOCAB, seed=0, capacity=128)
        self.sizes: list[int] = []
        self.broken = False

    def extend(self, rows: Sequence[Nodes]) -> list[Tensor]:
        if self.broken:
            raise RuntimeError("broken")
        self.sizes.append(sum(len(nodes.token_ids) for nodes in rows))
        return super().extend(rows)


def test_after_an_error_guesses_are_forgotten() -> None:
    backend = _Counting()
    drafter = ModelDrafter(backend, CHAIN, law="point")
    context = _context(temperature=0.0)
    for _ in range(3):
        (tree,) = drafter.propose([context], [6])
        context.token_ids += [*tree.token_list[1:3], 7]
    backend.broken = True
    with pytest.raises(RuntimeError):
        drafter.propose([context], [6])
    backend.broken = False
    (tree,) = drafter.propose([context], [6])
    fresh = ModelDrafter(_Counting(), CHAIN, law="point")
    (want,) = fresh.propose([_context(text=context.token_ids, temperature=0.0)], [6])
    assert tree.token_list == want.token_list


def test_the_policy_is_told_what_takes_no_pass(native: Any) -> None:
    seen: list[list[int]] = []

    class Policy:
        def num_expansions(self, *asked: Any) -> int:
            seen.append(list(asked[-1]))
            return 1

    plain = ModelDrafter(native, law="point", guesses=0, max_levels=4)
    limits = {plain: ModelLimits(Policy())}
    (want,) = plain.propose([_context(temperature=0.0)], [4], Limits(limits))
    assert [widths[:1] for widths in seen] == [[1], [1], [1], [1], []]
    seen.clear()
    drafter = ModelDrafter(native, law="point", max_levels=4)
    best = want.path(len(want) - 1)
    given = TokenTree.chain([want.token_list[node] for node in best])
    drafter.propose(
        [_context(temperature=0.0)],
        [4],
        Limits({drafter: ModelLimits(Policy())}, guesses={1: given}),
    )
    assert seen[0] == [1] and 0 in seen[1]


def test_levels_that_were_scored_cost_nothing() -> None:
    from planner_kit import curve

    step = StepBudget(1, np.full(9, 10.0))
    pace = LevelBudget(step, curve(0.0, 12.0), 50, 1.0)
    assert pace.num_expansions(1.0, 1, [], [0.9], [1], [1]) == 0
    assert pace.num_expansions(1.0, 1, [], [0.9, 0.8], [1, 1], [0, 1]) == 1
    assert step.levels_ms == 0.0


def test_guesses_are_made_while_they_save_more_than_they_cost() -> None:
    said, rates = Continuations(), guess_rates().rates
    for token in range(10):
        said.note([token - 1, token], [Saying(token + 1, 0.99), Saying(50, 0.01)])

    def chosen(levels: int, **how: Any) -> list[int]:
        start = Start((1, 2), levels)
        return [g.token for g in choose_guesses([start], [said], rates, 4, due=1, **how)]

    assert chosen(4) == [3, 4, 5, 6]
    assert chosen(2) == [3, 4]
    assert chosen(0) == []
    assert chosen(4, times=[1.0, 2.0, 3.0, 4.0, 5.0]) == []  # nothing is gained
    assert chosen(4, times=[1.0, 1.1, 1.2, 2.9, 3.9]) == [3, 4]
    assert len(chosen(4, rows=16)) < 4  # all rows must be right
    assert chosen(4, proposed=range(5)) == [3, 4]


def test_a_context_of_two_tokens_is_believed_before_one_of_one() -> None:
    said = Continuations()
    said.note([1, 2], [Saying(3, 0.9)])
    said.note([7, 2], [Saying(8, 0.9)])
    assert [token for token, _ in said.after([1, 2])] == [3]
    assert [token for token, _ in said.after([4, 1, 2])] == [3]
    assert [token for token, _ in said.after([9, 2])] == [8]
    assert said.after([1, 5]) == []
    text = Continuations(of_text=True)
    text.note([1, 2], [Saying(3, 1.0)])
    assert [token for token, _ in text.after([1, 2])] == [3]
    assert text.after([2]) == text.after([9, 2]) == []


def test_a_union_hands_free_trees_to_the_model_and_draws_as_before(native: Any) -> None:
    trees = []
    for guesses in (0, 8):
        model = ModelDrafter(native, CHAIN, guesses=guesses)
        union = UnionDrafter([NgramDrafter(), model])
        context = _context(temperature=0.8)
        made = list[TokenTree]()
        for _ in range(4):
            made += union.propose([context], [9])
            assert len(made[-1]) <= 9
            context.token_ids += made[-1].token_list[1:2] + TEXT
        trees.append(made)
    for tree, want in zip(*trees, strict=True):
        assert 0 in tree.law_list[1:] and 1 in tree.law_list[1:]
        _same(tree, want)
    assert model.guesser.num_guesses > 0


def test_a_number_of_guesses_is_a_count() -> None:
    with pytest.raises(ArgumentError, match="guesses"):
        ModelDrafter(TableBackend(vocab_size=12, seed=0), guesses=-1)
