"""What large trees cost beside the models' own forwards, step by step, as trees grow.

    python benchmarks/large_trees.py
    python benchmarks/large_trees.py --sizes 256 1024 --only verify --json out.json

No model runs: logits are random, peaked as a language model's, over a vocabulary of 152k tokens. A
node's row is a function of its token, so that draft model and target agree often, not always. The
time to gather rows is taken off. Medians of several repeats, in milliseconds; the last column is
the growth exponent between the sizes 256 and 1,024 (1: in proportion, 2: as the square).
"""

from __future__ import annotations

import argparse
import gc
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from time import perf_counter

import common
import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from redwood.algorithms.acceptance import AcceptanceTable, model_prior
from redwood.algorithms.sequoia import optimal_tree
from redwood.algorithms.specinfer import merge_trees
from redwood.backends.base import AcceptedPath, Nodes
from redwood.backends.eager.backend import _Row, _Span
from redwood.backends.rows import RowState
from redwood.drafters.base import ModelDrafter, NgramDrafter, UnionDrafter
from redwood.drafters.context import Context
from redwood.drafters.draft_tree import TreeBuilder
from redwood.drafters.limits import Limits, ModelLimits
from redwood.drafters.model import DEFAULT_ACCEPTANCE
from redwood.drafters.proposing import proposals
from redwood.drafters.vocabulary import DraftVocabulary
from redwood.engine.request import new_request
from redwood.engine.verification import verify_rows
from redwood.planner.budget import LatencyCorrection, LevelBudget, StepBudget
from redwood.planner.planner import Planner
from redwood.profiling.latency import LatencyModel, LatencyPoint
from redwood.sampling import PathRows, SamplingParams
from redwood.tree import Law, TokenTree, ancestor_mask

SIZES = (4, 8, 16, 64, 128, 256, 512, 1024)
VOCAB = 151_936
CONTEXT = 512  # tokens before the tree
KINDS = 512  # distinct rows of logits
LAYERS, HEADS, DIM = 16, 2, 64  # of the slots that commit moves
PARAMS = {
    "temperature 0": SamplingParams(),
    "seed": SamplingParams(temperature=0.8, seed=1),
    "0.6": SamplingParams(temperature=0.6),
}

Work = Callable[[], object]


class Logits:
    """Rows [n, V] by token, and the seconds that gathering them took."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size, self.spent_s = vocab_size, 0.0
        rng = np.random.default_rng(0)
        rows = rng.standard_normal((KINDS, vocab_size), dtype=np.float32) * 1.5
        for row in rows:  # some tokens stand out, the first ones most
            best = rng.integers(vocab_size, size=256)
            row[best] += 16.0 - 1.6 * np.log1p(np.arange(256)) - rng.exponential(2.0, 256)
        self._rows = torch.from_numpy(rows)

    def of(self, tokens: Sequence[int]) -> Tensor:
        """Returns the rows of these tokens."""
        start = perf_counter()
        rows = self._rows[torch.tensor(tokens) % KINDS]
        self.spent_s += perf_counter() - start
        return rows


class InstantBackend:
    """A backend without a model: slots are counted, logits are looked up."""

    name, device, capacity = "instant", torch.device("cpu"), 1 << 20

    def __init__(self, logits: Logits) -> None:
        self.vocab_size = logits.vocab_size
        self._logits = logits
        self._rows: dict[int, RowState] = {}

    def open(self) -> int:
        self._rows[len(self._rows)] = RowState()
        return len(self._rows) - 1

    def length(self, row: int) -> int:
        return self._rows[row].length

    def extend(self, rows: Sequence[Nodes]) -> list[Tensor]:
        made = []
        for nodes in rows:
            state = self._rows[nodes.row]
            state.parents, state.depths = state.grown(nodes, self.capacity)
            count = len(nodes.token_ids) if nodes.num_logits is None else nodes.num_logits
            made.append(self._logits.of(nodes.token_ids[len(nodes.token_ids) - count :]))
        return made

    def commit(self, rows: Sequence[AcceptedPath]) -> None:
        for kept in rows:
            state = self._rows[kept.row]
            state.check_path(kept)
            state.cut(state.length)
            state.length += len(kept.nodes)

    def truncate(self, row: int, length: int) -> None:
        self._rows[row].cut(length)

    def release(self, row: int) -> None:
        self._rows[row] = RowState()


def flat_curve(ms: float, per_node: float) -> LatencyModel:
    """Times of a target whose weights stream: the pass is dear, a node is not."""
    sizes = (1, 2048)
    points = [LatencyPoint(1, n, 0, *[ms + per_node * n] * 3) for n in sizes]
    return LatencyModel(tuple(points))


def some_text() -> list[int]:
    """Tokens that repeat themselves with changes, so that n-grams find much."""
    rng = np.random.default_rng(1)
    base = rng.integers(VOCAB, size=40)
    parts = []
    for _ in range(CONTEXT // 40 + 1):
        part = base.copy()
        part[rng.integers(40, size=8)] = rng.integers(VOCAB, size=8)
        parts.append(part)
    text: list[int] = np.concatenate(parts)[:CONTEXT].tolist()
    return text


def context_of(params: SamplingParams, vocab_size: int, key: int = 1) -> Context:
    text = [token % vocab_size for token in some_text()]
    return new_request(
        key, text, params, vocab_size=vocab_size, capacity=1 << 20, tokenizer=None
    ).context


class Drafting:
    """One way to draft: `propose` for a text, level by level as the planner's pace allows."""

    def __init__(self, logits: Logits, name: str, parts: str, size: int) -> None:
        self.context = context_of(PARAMS[name], logits.vocab_size)
        self.size = size
        model = ModelDrafter(InstantBackend(logits))
        drafters = {"model": [model], "ngram": [NgramDrafter()]}
        chosen = drafters.get(parts, [model, NgramDrafter()])
        self._models = [drafter for drafter in chosen if isinstance(drafter, ModelDrafter)]
        self._drafter = chosen[0] if len(chosen) == 1 else UnionDrafter(chosen)
        self._times = flat_curve(4000.0, 0.2).growth([CONTEXT], size - 1)
        self._draft = flat_curve(10.0, 0.1)

    def __call__(self) -> TokenTree:
        step = StepBudget(1, self._times)
        levels = ModelLimits(LevelBudget(step, self._draft, CONTEXT, 1.0))
        limits = Limits(dict.fromkeys(self._models, levels))
        return proposals(self._drafter, [self.context], [self.size], limits)[0]


def drafting(logits: Logits, size: int) -> Iterable[tuple[str, Work]]:
    """Whole trees, all levels, forwards left out; the tree before is learned from."""
    yield "dynamic, temperature 0", Drafting(logits, "temperature 0", "model", size)
    yield "dynamic, seed (coupled)", Drafting(logits, "seed", "model", size)
    yield "drawn, temperature 0.6", Drafting(logits, "0.6", "model", size)
    yield "n-gram", Drafting(logits, "temperature 0", "ngram", size)
    yield "union, temperature 0", Drafting(logits, "temperature 0", "union", size)
    yield "union, temperature 0.6", Drafting(logits, "0.6", "union", size)
    laws = (Law.POINT, Law.COUPLED, Law.WITHOUT_REPLACEMENT)
    for name, law in zip(PARAMS, laws, strict=True):
        yield f"one level of n/2 nodes, {name}", _level(logits, name, law, size)


def _level(logits: Logits, name: str, law: Law, size: int) -> Work:
    """Children for n / 2 nodes of one level."""
    context, half = context_of(PARAMS[name], logits.vocab_size), size // 2
    tokens = np.random.default_rng(2).integers(logits.vocab_size, size=half).tolist()
    rows = logits.of(tokens)
    rates, known = [*model_prior(), 0.7], DraftVocabulary(logits.vocab_size)

    def work() -> None:
        growing = TreeBuilder(context, law, None, size, 1 << 20, rates, known)
        growing.tokens += tokens
        growing.parents += [0] * half
        growing.place += [-1] * half
        growing.estimates += [0.5] * half
        growing.expand(1, range(1, half + 1), rows, 256)

    return work


def shape(size: int) -> list[int]:
    """A tree as Sequoia would draft it."""
    levels = max(8, min(24, size // 4))
    return optimal_tree(DEFAULT_ACCEPTANCE, size, max_levels=levels)


def grown_tree(logits: Logits, size: int, law: Law) -> tuple[ModelDrafter, TreeBuilder, TokenTree]:
    """A tree of Sequoia's shape, filled, and what made it; untimed."""
    name = {Law.POINT: "temperature 0", Law.COUPLED: "seed"}.get(law, "0.6")
    context = context_of(PARAMS[name], logits.vocab_size)
    drafter = ModelDrafter(InstantBackend(logits), shape(size))
    tree = drafter.propose([context], [size])[0]
    growing = drafter._rows[context.key].last
    assert growing is not None and len(tree) == size
    return drafter, growing, tree


def trees(logits: Logits, size: int) -> Iterable[tuple[str, Work]]:
    """The tree as a value, and what is learned from it."""
    model, growing, tree = grown_tree(logits, size, Law.POINT)
    tokens, parents, estimates = growing.tokens, growing.parents, growing.estimates
    rng = np.random.default_rng(3)
    others = [(token + 1) % logits.vocab_size if rng.random() < 0.5 else token for token in tokens]
    other = TokenTree.point([tokens[0], *others[1:]], parents, estimates)
    some = set(tree.path(size - 1)) | {n for n in range(size) if n < size // 2}
    half = sorted(some)
    deepest = max(range(size), key=lambda node: tree.depths[node])
    news = [tokens[node] for node in tree.path(deepest)[1:]]
    row = model._rows[growing.context.key]
    drafter = Drafting(logits, "temperature 0", "ngram", size)
    found = drafter()
    path = [found.token_list[node] for node in found.path(len(found) - 1)[1:]]
    known = next(iter(drafter._drafter._texts.values()))
    drafted, everyone = known.drafted, drafter._drafter._tables()

    def learn_ngram() -> None:
        known.drafted = drafted
        known.learn(path, everyone)

    yield "TokenTree.point", lambda: TokenTree.point(tokens, parents, estimates)
    yield "TreeBuilder.finish", growing.finish
    yield "TokenTree.kept, a half", lambda: tree.kept(half)
    yield "merge_trees, half of it new", lambda: merge_trees([tree, other])
    text = [*growing.context.token_ids, *news]
    table = AcceptanceTable([*model_prior(), 0.7])
    yield "TreeBuilder.learn, the longest path", lambda: growing.learn(text, [table])
    yield "NgramDrafter: learn", learn_ngram
    yield "drafter's row: follow", lambda: row.follow([tokens[0], *news])


def planning(logits: Logits, size: int) -> Iterable[tuple[str, Work]]:
    """Times within a step. The estimates are those of a drafted tree."""
    _, growing, tree = grown_tree(logits, size, Law.POINT)
    curve = flat_curve(4000.0, 8.0)
    correction = LatencyCorrection()
    for nodes in (1, 3, 9, 40, 100, 300, 900):
        correction.learn(nodes, 4100.0 + 9.0 * nodes, 4000.0 + 8.0 * nodes)
    times = curve.growth([CONTEXT], size - 1)
    drafter = Drafting(logits, "temperature 0", "model", 16)
    planner = Planner(drafter._models[0], curve, {drafter._models[0]: flat_curve(10.0, 0.1)},
                      most=size)  # fmt: skip
    offers = max(3, size // 8)
    gains = sorted((0.7 * chance for chance in growing.estimates[-offers:]), reverse=True)

    def num_expansions() -> int:
        pace = LevelBudget(StepBudget(1, times), flat_curve(10.0, 0.1), CONTEXT, 1.0)
        return pace.num_expansions(1.0, 1, growing.estimates[1:], gains, [1] * offers, [1] * offers)

    def begin() -> None:
        planner.drop(planner.begin([drafter.context], [1 << 20], [200]))

    begin()
    yield "Planner.begin", begin
    yield "LatencyCorrection.apply", lambda: correction.apply(times, 1)
    yield "num_expansions, n/8 offers", num_expansions
    yield "trim", lambda: StepBudget(1, times).trim([tree], 100.0)


def backend(logits: Logits, size: int) -> Iterable[tuple[str, Work]]:
    """The eager backend's work beside the forward."""
    parents, like = shape(size), torch.zeros(1)
    nodes = Nodes(0, list(range(size)), parents)
    row, quarter = _Row(), max(1, size // 4)
    row.length = CONTEXT
    row.parents, row.depths = row.grown(nodes, 1 << 20)
    last = Nodes(0, list(range(quarter)), parents[-quarter:])
    chain = Nodes(0, list(range(size)))
    tree = TokenTree.point(range(size), parents)
    deepest = max(range(size), key=lambda node: tree.depths[node])
    kept = AcceptedPath(0, tree.path(deepest))
    slots = torch.zeros(HEADS, CONTEXT + size, DIM)
    row.layers = {layer: (slots.clone(), slots.clone()) for layer in range(LAYERS)}
    state = list(row.parents), list(row.depths)
    line = _Row()
    line.parents, line.depths = line.grown(chain, 1 << 20)

    def commit() -> None:
        row.parents, row.depths, row.length = *state, CONTEXT
        row.check_path(kept)
        row.keep(kept.nodes)
        row.parents, row.depths, row.length = *state, CONTEXT

    yield "RowState.grown", lambda: RowState().grown(nodes, 1 << 20)
    yield "ancestor_mask", lambda: ancestor_mask(parents)
    yield "_Span and mask, whole tree", lambda: _Span(row, nodes, 0).mask(None, 4, like)
    yield "_Span and mask, the last n/4", lambda: _Span(row, last, 0).mask(None, 4, like)
    yield "_Span and mask, a chain", lambda: _Span(line, chain, 0).mask(None, 4, like)
    yield f"commit, {LAYERS} layers", commit


def verify(logits: Logits, size: int) -> Iterable[tuple[str, Work]]:
    """The rules as the engine calls them, from the logits of all nodes on."""
    drawn, one = Law.WITHOUT_REPLACEMENT, SamplingParams(temperature=1.0)
    cases = [
        ("greedy, temperature 0", Law.POINT, SamplingParams()),
        ("coupled, seed", Law.COUPLED, PARAMS["seed"]),
        ("traversal, top-k nodes", Law.POINT, one),
        ("traversal, drawn", drawn, one),
        ("recursive, drawn", drawn, replace(one, verifier="recursive")),
        ("traversal, drawn, top-p 0.9", drawn, replace(one, top_p=0.9)),
    ]
    for name, law, params in cases:
        _, _, tree = grown_tree(logits, size, law)
        scored = logits.of(tree.token_list)
        context = context_of(params, logits.vocab_size)

        def work(
            tree: TokenTree = tree, scored: Tensor = scored, context: Context = context
        ) -> object:
            context.rng = np.random.default_rng(4)
            tree.__dict__.pop("_draft_cache", None)  # rows are read once for every tree
            rows = PathRows(scored, tree, context.params, context.history)
            return verify_rows(context, tree, rows)

        yield name, work


PARTS = {
    "drafting": drafting,
    "trees": trees,
    "planning": planning,
    "backend": backend,
    "verify": verify,
}


def timed(work: Work, logits: Logits, at_most_s: float) -> float:
    """Median milliseconds of at least 3 repeats."""
    work()
    taken: list[float] = []
    gc.collect()
    end = perf_counter() + at_most_s
    while len(taken) < 3 or (perf_counter() < end and len(taken) < 200):
        logits.spent_s, start = 0.0, perf_counter()
        work()
        taken.append(1e3 * (perf_counter() - start - logits.spent_s))
    return median(taken)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--vocab", type=int, default=VOCAB)
    parser.add_argument("--seconds", type=float, default=0.3, help="for the repeats of one number")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logits = Logits(options.vocab)
    rows: dict[str, dict[str, dict[int, float]]] = {part: {} for part in options.only}
    for part in options.only:
        for size in options.sizes:
            for name, work in PARTS[part](logits, size):
                ms = timed(work, logits, options.seconds)
                rows[part].setdefault(name, {})[size] = ms
    table = Table(title=f"milliseconds beside the forwards, {options.vocab:,} tokens")
    for column in ("step", *map(str, options.sizes), "growth"):
        table.add_column(column, justify="left" if column == "step" else "right", no_wrap=True)
    for part, steps in rows.items():
        table.add_section()
        for name, times in steps.items():
            cells = [f"{times[size]:.{3 if times[size] < 1 else 1}f}" for size in options.sizes]
            growth = ""
            if {256, 1024} <= times.keys():
                growth = f"{math.log(times[1024] / times[256], 4):.2f}"
            table.add_row(f"{part}: {name}", *cells, growth)
    Console(width=140).print(table)
    if options.json:
        setting = common.setting(vocab=options.vocab, threads=options.threads)
        common.write(options.json, setting, ms=rows)


if __name__ == "__main__":
    main()
