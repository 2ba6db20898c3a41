"""The law of what a rule puts out, its distance to the target's law, and the checks made of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
from numpy.typing import NDArray

from redwood.errors import ArgumentError
from redwood.testing.cases import (
    Case,
    Draft,
    Path,
    drafts,
    earlier_siblings,
    path_to,
    target_table,
)
from redwood.testing.enumeration import (
    ExactnessError,
    Row,
    Rule,
    Script,
    ScriptedChance,
    runs,
)
from redwood.tree import Law, TokenTree
from redwood.verify import Acceptance, Noise

CoupledRule = Callable[[TokenTree, Row, Noise], Acceptance]


@dataclass(frozen=True)
class Stateful:
    """A rule that carries something from step to step; `start()` gives a fresh one for each run."""

    start: Callable[[], Rule]


def law(
    rule: Rule | Stateful, case: Case, *, steps: int = 1, length: int | None = None
) -> NDArray[np.float64]:
    """Returns the law of the first `length` tokens that the rule puts out: float64 [V, ..., V].

    Shorter outputs are continued by the target's own rows. Every step draws a fresh tree below what
    the steps before it have put out.

    Args:
        steps: how many steps are enumerated together.
        length: default `steps * case.levels`, the longest output there is.

    Raises:
        ExactnessError: chance used twice, chance of the rule's own, or an answer that is no path.
    """
    if length is None:
        length = steps * case.levels
    ended = [np.zeros((case.vocab_size,) * size) for size in range(length + 1)]
    for probability, (tokens, _) in _runs(rule, case, steps):
        ended[min(len(tokens), length)][tokens[:length]] += probability
    return _continued(case, ended)


def target_law(case: Case, length: int) -> NDArray[np.float64]:
    """Returns the target's own law of the first `length` tokens: float64 [V, ..., V]."""
    return _continued(
        case, [np.full((case.vocab_size,) * size, float(size == 0)) for size in range(length + 1)]
    )


def total_variation(rule: Rule | Stateful, case: Case, *, steps: int = 1) -> float:
    """Returns the distance, in [0, 1], of the rule's law from the target's.

    0 for an exact rule. All tokens that the rule has a hand in are compared.

    Raises:
        ExactnessError: as `law`.
    """
    mine = law(rule, case, steps=steps)
    return 0.5 * float(np.abs(mine - target_law(case, mine.ndim)).sum())


def expected_kept(rule: Rule | Stateful, case: Case) -> float:
    """Returns the expected number of drafted tokens that one step keeps, the extra one not counted.

    Raises:
        ExactnessError: as `law`.
    """
    return sum(probability * kept for probability, (_, kept) in _runs(rule, case, 1))


def check_exact(
    rule: Rule | Stateful, cases: Iterable[Case], tolerance: float = 1e-12, *, steps: int = 1
) -> float:
    """Returns the largest total variation over the cases, for an exact rule a rounding error.

    Raises:
        ExactnessError: it exceeds `tolerance` (the message names the worst case), or as `law`.
    """
    worst, where = -1.0, ""
    for case in cases:
        try:
            distance = total_variation(rule, case, steps=steps)
        except Exception as error:
            error.add_note(f"in {case.name}")
            raise
        if not distance <= worst:  # NaN counts as worse
            worst, where = distance, case.name
    if worst < 0.0:
        raise ArgumentError("no cases to check")
    if not worst <= tolerance:
        raise ExactnessError(
            f"the rule changes the target's law: total variation {worst:.3g} > {tolerance:g} in "
            f"{where}"
        )
    return worst


def check_coupled(
    rule: CoupledRule, cases: Iterable[Case], *, seed: int = 0, noises: int = 6
) -> None:
    """Checks that a rule puts out what plain decoding with the same noise does, token by token.

    The plain choice after a path is the arg-max of log p + noise(depth), lowest token among equals
    (shared noise: arXiv 2408.07978, 2506.05632). Each case is met with Gumbel noise, with noise of
    another shape and with none, with trees as a coupled drafter would draw them, with arbitrary
    tokens, and with nodes removed after drawing; nodes that are not POINT in the case are COUPLED.

    Args:
        rule: as `verify.coupled`: (tree, target_probs [N, V], noise: depth -> row [V]).
        seed: not negative; fixes noise and trees.
        noises: trees with noise per case.

    Raises:
        ExactnessError: another token, or an answer that is no path; the message names the case.
    """
    for case in cases:
        for number in range(noises):
            rng = np.random.default_rng([seed, number])
            table = _noise(rng, number, (case.levels, case.vocab_size))
            tree = _coupled_tree(case, table, rng, number)
            given = target_table(case, tree.parent_list, tree.token_list)
            try:
                tokens = _tokens(tree, rule(tree, given, table.__getitem__), case.vocab_size)
            except Exception as error:
                error.add_note(f"in {case.name}, noise {number}")
                raise
            plain = _plain(case, table, len(tokens))
            if tokens != plain:
                raise ExactnessError(
                    f"the rule puts out {tokens} where plain decoding gives {plain} "
                    f"in {case.name}, noise {number}"
                )


def _runs(
    rule: Rule | Stateful, case: Case, steps: int
) -> Iterator[tuple[float, tuple[Path, int]]]:
    """All runs of `steps` steps: probability, tokens put out, drafted tokens kept."""
    drawn: dict[Path, tuple[list[float], list[Draft]]] = {}

    def program(script: Script) -> tuple[Path, int]:
        judge = rule.start() if isinstance(rule, Stateful) else rule
        tokens: Path = ()
        kept = 0
        for _ in range(steps):
            if tokens not in drawn:
                trees = drafts(case, tokens)
                drawn[tokens] = [draft.probability for draft in trees], trees
            weights, trees = drawn[tokens]
            draft = trees[script.choose(weights)]
            accepted = judge(draft.tree, draft.target_probs, ScriptedChance(script))
            tokens += _tokens(draft.tree, accepted, case.vocab_size)
            kept += len(accepted.nodes) - 1
        return tokens, kept

    return runs(program)


def _tokens(tree: TokenTree, accepted: Acceptance, vocab_size: int) -> Path:
    """The tokens put out: those of the kept nodes and the extra one."""
    nodes, last = list(accepted.nodes), int(accepted.next_token)
    parents = [-1, *nodes[:-1]]
    is_path = bool(nodes) and all(
        0 <= node < len(tree) and tree.parent_list[node] == parent
        for node, parent in zip(nodes, parents, strict=True)
    )
    if not is_path or not 0 <= last < vocab_size:
        raise ExactnessError(f"{accepted} is no path from the root with a token after it")
    return (*(tree.token_list[node] for node in nodes[1:]), last)


def _continued(case: Case, ended: list[NDArray[np.float64]]) -> NDArray[np.float64]:
    """Carries the mass of outputs of each length on to the longest, by the target's rows."""
    for size, mass in enumerate(ended[:-1]):
        for path in product(range(case.vocab_size), repeat=size):
            if mass[path] > 0.0:
                ended[size + 1][path] += mass[path] * case.target_row(path)
    return ended[-1]


def _noise(rng: np.random.Generator, number: int, shape: tuple[int, int]) -> NDArray[np.float64]:
    if number % 3 == 2:
        return np.zeros(shape) if number == 2 else rng.normal(0.0, 5.0, shape)
    return rng.gumbel(size=shape)


def _choice(row: Row, noise: Row) -> int:
    scores = [np.log(p) + g if p > 0.0 else -np.inf for p, g in zip(row, noise, strict=True)]
    return scores.index(max(scores))


def _plain(case: Case, table: NDArray[np.float64], length: int) -> Path:
    path: Path = ()
    for depth in range(length):
        path = (*path, _choice(case.target_row(path), table[depth]))
    return path


def _coupled_tree(
    case: Case, table: NDArray[np.float64], rng: np.random.Generator, number: int
) -> TokenTree:
    """A tree drawn with the noise; every second one has nodes removed, every third any tokens."""
    tokens = [0]
    for node in range(1, len(case.parents)):
        path = path_to(case.parents, case.parents[node], tokens)
        if number % 3 == 1:
            tokens.append(int(rng.integers(case.vocab_size)))
        elif case.laws[node] == Law.POINT:
            siblings = tuple(tokens[i] for i in earlier_siblings(case, node))
            tokens.append(case.choose(node, path, siblings))
        else:
            row, left = case.draft_row(case.sources[node], path).copy(), table[len(path)].copy()
            for i in earlier_siblings(case, node, same_row=True):
                row[tokens[i]], left[tokens[i]] = 0.0, -np.inf
            tokens.append(_choice(row, left) if row.any() else int(np.argmax(left)))
    laws = [law if law == Law.POINT else Law.COUPLED for law in case.laws]
    keep = [0]
    for node in range(1, len(tokens)):
        if case.parents[node] in keep and (number % 2 == 0 or rng.random() < 0.6):
            keep.append(node)
    place = {node: i for i, node in enumerate(keep)} | {-1: -1}
    columns = (
        [tokens[i] for i in keep],
        [place[case.parents[i]] for i in keep],
        [laws[i] for i in keep],
        [-1] * len(keep),
    )
    token_ids, parents, drawn_by, rows = (torch.tensor(column) for column in columns)
    return TokenTree(token_ids, parents, drawn_by, rows)
