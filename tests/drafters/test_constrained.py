"""Drafts under a constraint: the law of the text, faults of the constraint, forced tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import redwood
from constraint_kit import ToyGrammar
from redwood import testing, verify
from redwood.drafters.base import ModelDrafter, NgramDrafter, UnionDrafter
from redwood.drafters.constrained import allowed, continued
from redwood.drafters.context import Context
from redwood.engine.engine import RowEngine
from redwood.sampling import History, SamplingParams
from redwood.sampling.constraint import Chain
from redwood.testing import Case, TableBackend, drafts, outcomes
from redwood.tree import Law, TokenTree

VOCAB = 12


def masked(case: Case, toy: ToyGrammar) -> Case:
    """The case with a target under the toy's mask; draft rows stay as they are."""

    def target(path: Any) -> Any:
        row, kept = np.zeros(case.vocab_size), toy.after(path[1:] if path[:1] == (-1,) else path)
        row[kept] = case.target_row(path)[kept]
        if not row.sum() > 0.0:
            row[kept] = 1.0
        return row / row.sum()

    return replace(case, target=target)


def context_of(toy: Any, root: int = 0, **params: Any) -> Context:
    made = SamplingParams(logits_processor=toy, **{"temperature": 1.0, **params})
    return Context(1, [root], made, History([root]), toy.vocab_size)


def law_of(case: Case, rule: Any, change: Callable[[TokenTree], TokenTree]) -> Any:
    """The law of the first two tokens, trees being changed after they were drawn."""
    size = case.vocab_size
    made = np.zeros((size, size))
    for draft in drafts(case):
        tree = change(draft.tree)
        tokens = [tuple(tree.token_list[n] for n in tree.path(i)[1:]) for i in range(len(tree))]
        rows = np.stack([case.target_row(path) for path in tokens])
        for chance, kept in outcomes(rule, tree, rows):
            text = (*tokens[kept.nodes[-1]], kept.next_token)
            if len(text) == 1:
                made[text[0]] += draft.probability * chance * case.target_row(text)
            else:
                made[text[0], text[1]] += draft.probability * chance
    return made


def off_by(case: Case, made: Any) -> float:
    first = case.target_row(())
    wanted = np.stack([first[x] * case.target_row((x,)) for x in range(case.vocab_size)])
    return 0.5 * float(np.abs(made - wanted).sum())


def cases() -> Iterator[tuple[Case, ToyGrammar]]:
    found = testing.random_cases(seed=5, count=60, vocab_sizes=(3, 4), max_nodes=5, max_runs=200)
    for seed, case in enumerate(found):
        toy = ToyGrammar(case.vocab_size, 1, seed)
        yield masked(case, toy), toy


@pytest.mark.parametrize("rule", [verify.traversal, verify.recursive])
@pytest.mark.parametrize("budget", [5, 9])
def test_pruned_and_continued_trees_keep_the_law(rule: Any, budget: int) -> None:
    changed = 0
    for case, toy in cases():
        context = context_of(toy)

        def change(tree: TokenTree, context: Context = context) -> TokenTree:
            return continued(context, allowed(context, tree), budget)

        changed += any(change(draft.tree) is not draft.tree for draft in drafts(case))
        assert off_by(case, law_of(case, rule, change)) < 1e-12, case.name
    assert changed > 20


def test_a_drawn_node_that_is_dropped_would_change_the_law() -> None:
    """The control: what `allowed` must not do."""
    worst = 0.0
    for case, toy in cases():

        def change(tree: TokenTree, toy: ToyGrammar = toy) -> TokenTree:
            fine = [
                n
                for n in range(len(tree))
                if toy.accepts([0], [tree.token_list[i] for i in tree.path(n)[1:]])
                == len(tree.path(n)) - 1
            ]
            point = TokenTree.of_lists(
                tree.token_list,
                tree.parent_list,
                [0] * len(tree),
                [-1] * len(tree),
                None,
                None,
                None,
            ).kept(fine)
            return TokenTree.of_lists(
                point.token_list,
                point.parent_list,
                [tree.law_list[n] for n in fine],
                [tree.draft_row_list[n] for n in fine],
                tree.draft_probs,
                tree.draft_ids,
                None,
            )

        worst = max(worst, off_by(case, law_of(case, verify.recursive, change)))
    assert worst > 1e-3


def test_slots_that_a_row_cannot_fill_may_stay_closed() -> None:
    """Fewer children than the shape has, where the row has fewer tokens: known before the draw."""
    shorter, laws = 0, (Law.POINT, Law.WITHOUT_REPLACEMENT)
    for case in testing.random_cases(seed=2, count=130, laws=laws, vocab_sizes=(3, 4)):

        def change(tree: TokenTree) -> TokenTree:
            kept, used = [0], dict[tuple[int, int], int]()
            for node in range(1, len(tree)):
                law, row = tree.law_list[node], tree.draft_row_list[node]
                if tree.parent_list[node] not in kept:
                    continue
                if law == Law.WITHOUT_REPLACEMENT:
                    key = tree.parent_list[node], row
                    used[key] = used.get(key, 0) + 1
                    if used[key] > int((tree.draft_row(row).probs > 0.0).sum()):
                        continue
                kept.append(node)
            place = {node: i for i, node in enumerate(kept)}
            return TokenTree.of_lists(
                [tree.token_list[n] for n in kept],
                [place.get(tree.parent_list[n], -1) for n in kept],
                [tree.law_list[n] for n in kept],
                [tree.draft_row_list[n] for n in kept],
                tree.draft_probs,
                tree.draft_ids,
                None,
            )

        shorter += any(len(change(draft.tree)) < len(draft.tree) for draft in drafts(case))
        assert off_by(case, law_of(case, verify.traversal, change)) < 1e-12, case.name
    assert shorter > 0


def drafters() -> dict[str, Callable[[], Any]]:
    def model() -> ModelDrafter:
        return ModelDrafter(TableBackend(VOCAB, seed=3))

    return {
        "none": lambda: None,
        "ngram": NgramDrafter,
        "model": model,
        "union": lambda: UnionDrafter([NgramDrafter(), model()]),
    }


PROMPT = [3, 1, 4, 1, 5]


def texts(toy: Any, drafter: Any, budget: int = 8, eos: Any = (), **params: Any) -> tuple[Any, Any]:
    engine = RowEngine(TableBackend(VOCAB, seed=0), drafter, budget=budget, eos_ids=eos)
    key = engine.add(PROMPT, SamplingParams(logits_processor=toy, **params))
    stats, tokens = engine.stats(key), list[int]()
    while engine.busy:
        for step in engine.step():
            assert step.error is None
            tokens += step.token_ids
    return tokens, stats


@pytest.mark.parametrize("name", list(drafters()))
@pytest.mark.parametrize("sampling", [{"temperature": 0.0}, {"temperature": 1.0, "seed": 4}])
@pytest.mark.parametrize("budget", [2, 8])
def test_texts_equal_plain_decoding(name: str, sampling: dict[str, Any], budget: int) -> None:
    passes = tokens = 0
    for seed in range(4):
        toy = ToyGrammar(VOCAB, len(PROMPT), seed, end=30)
        plain, _ = texts(toy, None, 1, (0,), max_tokens=40, speculate=False, **sampling)
        made, stats = texts(toy, drafters()[name](), budget, (0,), max_tokens=40, **sampling)
        assert made == plain
        passes, tokens = passes + stats.target_passes, tokens + len(plain)
    assert passes < 0.9 * tokens


@pytest.mark.parametrize("law", ["without_replacement", "with_replacement", "point"])
def test_unseeded_texts_stay_within_the_grammar(law: str) -> None:
    toy = ToyGrammar(VOCAB, len(PROMPT), 1, end=50)
    drafter = ModelDrafter(TableBackend(VOCAB, seed=3), law=law)
    made, _ = texts(toy, drafter, max_tokens=55, temperature=1.0)
    assert toy.accepts(PROMPT, made) == len(made) == 55


def test_a_forced_run_takes_one_pass_whatever_else_drafts() -> None:
    class Forced(ToyGrammar):
        def after(self, answer: Any) -> list[int]:
            return [(7 * len(answer) + 1) % VOCAB]

    for make in drafters().values():
        toy = Forced(VOCAB, len(PROMPT))
        made, stats = texts(toy, make(), 8, max_tokens=32, temperature=0.0)
        assert made == [(7 * i + 1) % VOCAB for i in range(32)]
        assert stats.target_passes == 4


class Faulty(ToyGrammar):
    """Its mask is right, its hints are not."""

    def __init__(self, fault: Any) -> None:
        super().__init__(VOCAB, len(PROMPT), 2, end=30)
        self.fault = fault

    def accepts(self, text: Any, path: Any) -> Any:
        return self.fault("accepts")

    def ahead(self, text: Any, path: Any, most: int) -> Any:
        return self.fault("ahead")


def _raise(_: str) -> Any:
    raise RuntimeError("a faulty grammar")


@pytest.mark.parametrize(
    "fault",
    [
        _raise,
        lambda name: None,
        lambda name: 10**6 if name == "accepts" else [Chain([VOCAB + 5], [1.0])],
        lambda name: -3 if name == "accepts" else [Chain([1, 2], [0.5])],
        lambda name: 0 if name == "accepts" else [Chain([1], [float("nan")])],
        lambda name: 1 if name == "accepts" else [Chain([1, 2, 3], [2.0, -1.0, 5.0])],
        lambda name: "x" if name == "accepts" else [Chain(["a"], [1.0])],  # type: ignore[list-item]
        lambda name: 2 if name == "accepts" else [Chain([4] * 500, [1.0] * 500)],
    ],
)
@pytest.mark.parametrize("name", list(drafters()))
def test_a_faulty_constraint_costs_drafts_and_nothing_else(fault: Any, name: str) -> None:
    for sampling in ({"temperature": 0.0}, {"temperature": 1.0, "seed": 9}):
        right = ToyGrammar(VOCAB, len(PROMPT), 2, end=30)
        plain, _ = texts(right, None, 1, (0,), max_tokens=40, speculate=False, **sampling)
        made, _ = texts(Faulty(fault), drafters()[name](), 8, (0,), max_tokens=40, **sampling)
        assert made == plain


def test_the_best_nodes_stay_within_the_budget() -> None:
    toy = ToyGrammar(VOCAB, 1, 3)
    tree = TokenTree.point([0, *range(1, 8)], [-1] + [0] * 7, [1.0] + [0.1] * 7)
    for budget in (2, 5, 8):
        made = continued(context_of(toy), tree, budget)
        assert len(made) <= max(budget, len(tree))


def test_a_request_without_speculation_is_plain() -> None:
    toy = ToyGrammar(VOCAB, len(PROMPT), 1)
    _, stats = texts(toy, NgramDrafter(), max_tokens=20, temperature=0.0, speculate=False)
    assert stats.target_passes == 20 and stats.num_draft_tokens == 0


def test_a_plain_processor_is_no_constraint() -> None:
    toy = ToyGrammar(VOCAB, 1)
    context = context_of(toy)
    assert context.constraint is toy
    bare = replace(context, params=SamplingParams(logits_processor=lambda ids, scores: scores))
    assert bare.constraint is None
    assert redwood.SamplingParams is SamplingParams
