"""Random configurations of the whole engine, on models by table: every text is the plain one."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest

from redwood.drafters.base import Drafter, ModelDrafter, NgramDrafter, join_drafters
from redwood.engine.engine import RowEngine
from redwood.planner.planner import Planner
from redwood.profiling.latency import LatencyModel, LatencyPoint
from redwood.sampling import SamplingParams
from redwood.testing import TableBackend
from redwood.tree import TokenTree

Answer = tuple[list[int], str, str | None, list[Any]]
_GROUPS, _EACH = 6, 25


class Letters:
    """A tokenizer of single letters."""

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return "".join(chr(97 + token) for token in ids)


class Flaky:
    """A drafter that now and then raises, or answers what cannot be verified."""

    def __init__(self, drafter: Drafter, dice: random.Random) -> None:
        self._drafter, self._dice = drafter, dice
        self.name, self.draws = f"flaky {drafter.name}", drafter.draws
        self.faults = 0

    def propose(self, contexts: Any, budgets: Any) -> Any:
        kind = self._dice.randrange(12)
        self.faults += kind < 6
        if kind == 0:
            raise RuntimeError("before it drafted")
        made: Any = self._drafter.propose(contexts, budgets)
        if kind == 1:
            raise ValueError("after it drafted")
        if kind == 2:
            return made[1:]
        at = self._dice.randrange(len(made))
        if kind == 3:
            made[at] = None
        elif kind == 4:
            made[at] = TokenTree.chain([contexts[at].token_ids[-1], contexts[at].vocab_size])
        elif kind == 5:
            made[at] = TokenTree.chain([contexts[at].token_ids[-1]] * (budgets[at] + 1))
        return made

    def release(self, key: int) -> None:
        self._drafter.release(key)
        if self._dice.random() < 0.3:
            raise RuntimeError("after it let go")


class FlakyBackend(TableBackend):
    """A draft model some of whose passes fail, before or after the nodes were taken."""

    def __init__(self, dice: random.Random, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._dice = dice

    def extend(self, rows: Any) -> Any:
        if (chance := self._dice.random()) < 0.05:
            raise RuntimeError("before the pass")
        made = super().extend(rows)
        if chance > 0.95:
            raise RuntimeError("after the pass")
        return made


def _curve(base: float, per_node: float) -> LatencyModel:
    times = {nodes: base + per_node * nodes for nodes in (1, 2, 4, 8, 16)}
    return LatencyModel(tuple(LatencyPoint(1, n, 0, ms, ms, ms) for n, ms in times.items()))


def _params(dice: random.Random, vocab_size: int) -> SamplingParams:
    given: dict[str, Any] = {
        "max_tokens": dice.choice([1, 2, 3, 7, 20, 60]),
        "temperature": dice.choice([0.0, 0.3, 1.0, 3.0]),
        "seed": dice.choice([1, 5, -3, 2**63]),
    }
    letters = [chr(97 + token) for token in range(vocab_size)]
    stops = ["".join(dice.choices(letters, k=dice.randint(1, 3))) for _ in range(2)]
    some: dict[str, list[Any]] = {
        "top_k": [1, 2, 3, 20],
        "top_p": [0.1, 0.5, 0.9, 0.999999999],
        "min_p": [0.05, 0.5, 1.0],
        "repetition_penalty": [0.7, 1.3],
        "presence_penalty": [-1.0, 0.5],
        "frequency_penalty": [-0.5, 1.0],
        "logit_bias": [{dice.randrange(vocab_size): dice.choice([-100.0, 3.0])}],
        "prediction": [dice.choices(range(vocab_size), k=size) for size in (1, 5, 30)],
        "stop": [stops, stops[:1]],
        "ignore_eos": [True],
        "logprobs": [0, 3, 20],
        "verifier": ["coupled"],
        "speculate": [False],
    }
    given |= {name: dice.choice(values) for name, values in some.items() if dice.random() < 0.25}
    return SamplingParams(**given)


def _drafters(dice: random.Random, number: int, vocab_size: int, faulty: bool) -> list[Any]:
    def model() -> ModelDrafter:
        width = dice.choice([vocab_size, vocab_size, 3, vocab_size + 4])
        options = {
            "seed": number + dice.choice([0, 1000]),
            "capacity": dice.choice([10, 40, 80]),
        }
        backend = TableBackend(width, **options)
        if faulty:
            backend = FlakyBackend(dice, width, **options)
        return ModelDrafter(
            backend,
            law=dice.choice(["without_replacement", "with_replacement", "point"]),
            window=dice.choice([None, None, 3, 8]),
            width=dice.choice([3, 256]),
        )

    kinds = dice.choice(["n", "m", "mn", "mmn", "nn"])
    made: list[Any] = [NgramDrafter() if kind == "n" else model() for kind in kinds]
    return [Flaky(each, dice) if faulty and dice.random() < 0.5 else each for each in made]


def _answers(engine: RowEngine, asked: Sequence[tuple[list[int], SamplingParams]]) -> list[Answer]:
    made: dict[int, Answer] = {engine.add(*each): ([], "", None, []) for each in asked}
    while engine.busy:
        for step in engine.step():
            assert step.error is None, step.error
            tokens, text, _, found = made[step.request]
            made[step.request] = (
                tokens + step.token_ids,
                text + step.text,
                step.finish_reason,
                found + (step.logprobs or []),
            )
    return list(made.values())


def _try(number: int, planned: bool, faulty: bool) -> int:
    """One configuration; returns the tokens that drafts gave."""
    dice = random.Random(number)
    vocab_size = dice.choice([5, 8, 12])
    target = TableBackend(
        vocab_size,
        seed=number,
        capacity=dice.choice([24, 40, 64]),
        spread=dice.choice([0.5, 2.0, 4.0]),
        order=dice.choice([1, 2]),
    )
    asked = [
        (
            dice.choices(range(vocab_size), k=dice.choice([1, 2, 5, 15, 22])),
            _params(dice, vocab_size),
        )
        for _ in range(dice.choice([1, 1, 3]))
    ]
    common: dict[str, Any] = {"tokenizer": Letters(), "eos_ids": [0]}
    plain = [_answers(RowEngine(target, **common), [each])[0] for each in asked]
    parts = _drafters(dice, number, vocab_size, faulty)
    models = [part for part in parts if isinstance(part, ModelDrafter)]
    drafter = join_drafters(parts)
    planner = None
    if planned:
        planner = Planner(
            drafter,
            _curve(dice.choice([0.1, 5.0, 50.0]), dice.choice([0.01, 1.0])),
            {model: _curve(dice.choice([0.01, 1.0, 5.0]), 0.01) for model in models},
            most=dice.choice([4, 16, 64]),
        )
    engine = RowEngine(
        target,
        drafter,
        budget=dice.choice([1, 2, 4, 16, 20]),
        planner=planner,
        max_rows=dice.choice([1, 2, 64]),
        prefill_chunk=dice.choice([1, 3, 512]),
        **common,
    )
    accepted = 0
    counted = engine.step

    def step() -> Any:
        nonlocal accepted
        steps = counted()
        accepted += sum(each.num_accepted for each in steps)
        return steps

    engine.step = step  # type: ignore[method-assign]
    assert _answers(engine, asked) == plain
    assert target.num_rows == 0, "a row of the target was not given back"
    backends = [model.backend for model in models]
    assert not any(backend.num_rows for backend in backends), "a row of a draft model, too"
    return accepted


@pytest.mark.parametrize("faulty", [False, True], ids=["sound", "faulty"])
@pytest.mark.parametrize("planned", [False, True], ids=["budget", "planned"])
@pytest.mark.parametrize("group", range(_GROUPS))
def test_any_engine_answers_as_plain_decoding_does(group: int, planned: bool, faulty: bool) -> None:
    numbers = range(_EACH * group, _EACH * (group + 1))
    accepted = sum(_try(number, planned, faulty) for number in numbers)
    assert planned or accepted > 0, "nothing was drafted"  # a planner goes by the clock
