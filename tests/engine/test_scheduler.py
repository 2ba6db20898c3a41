"""Rows in company: who joins when, prompts filled beside others, faults that stay in a row."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from conftest import tiny_llama
from redwood.algorithms.specinfer import expansion_tree
from redwood.backends.load import wrap_model
from redwood.backends.native.load import load_native
from redwood.drafters.base import ModelDrafter, NgramDrafter, NoDrafter, UnionDrafter
from redwood.drafters.context import Context
from redwood.engine.engine import RowEngine, Step
from redwood.engine.text import Engine
from redwood.errors import ArgumentError, CapacityError
from redwood.planner.from_profile import make_planner
from redwood.sampling import SamplingParams
from redwood.tree import TokenTree

PROMPTS = [[5, 9, 17, 33, 5, 9, 17, 40, 5, 9], [2, 3, 2, 3, 2, 3, 2], [77], list(range(100, 160))]


def _target() -> Any:
    return wrap_model(tiny_llama())


def _drain(engine: RowEngine) -> dict[int, list[Step]]:
    made: dict[int, list[Step]] = {}
    while engine.busy:
        for step in engine.step():
            made.setdefault(step.request, []).append(step)
    return made


def _tokens(steps: Sequence[Step]) -> list[int]:
    return [token for step in steps for token in step.token_ids]


def test_no_request_overtakes_another_while_it_waits_for_room() -> None:
    engine = RowEngine(_target(), max_rows=8, kv_tokens=60)
    sizes = (30, 40, 5, 5)
    keys = [engine.add([3], SamplingParams(max_tokens=n, ignore_eos=True)) for n in sizes]
    order, widths = [], []
    while engine.busy:
        steps = engine.step()
        widths.append(len(steps))
        for step in steps:
            if step.request not in order:
                order.append(step.request)
    # 31 and 41 do not fit together: the second waits, and the small ones wait behind it.
    assert order == keys
    assert widths[:30] == [1] * 30 and widths[30] == 3


def test_a_request_larger_than_all_rows_is_refused_at_once() -> None:
    engine = RowEngine(_target(), kv_tokens=20)
    with pytest.raises(CapacityError, match="max_tokens"):
        engine.add([1, 2, 3], SamplingParams(max_tokens=18))
    assert not engine.busy


@pytest.mark.parametrize("wrong", [{"kv_tokens": 0}, {"prefill_beside": 0}, {"max_rows": 0}])
def test_limits_below_one_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ArgumentError, match=next(iter(wrong))):
        RowEngine(_target(), **wrong)  # type: ignore[arg-type]


def test_a_long_prompt_goes_in_by_parts_while_others_decode() -> None:
    engine = RowEngine(_target(), NgramDrafter(), budget=4, prefill_beside=8)
    first = engine.add(PROMPTS[0], SamplingParams(max_tokens=60, ignore_eos=True))
    engine.step()
    long = engine.add(list(range(60, 160)), SamplingParams(max_tokens=5))
    waited = 0
    steps = engine.step()
    while long not in [step.request for step in steps]:
        assert [step.request for step in steps] == [first]
        waited += 1
        steps = engine.step()
    assert waited == 13  # 99 tokens by 8, and no step of the first was left out


def _drafters() -> dict[str, Any]:
    def noisy() -> Any:
        model = tiny_llama()
        torch.manual_seed(7)
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(torch.randn_like(weight) * 0.08 * weight.std())
        return wrap_model(model)

    return {
        "none": NoDrafter,
        "ngram": NgramDrafter,
        "model": lambda: ModelDrafter(noisy(), expansion_tree([2, 1]), width=32),
    }


@pytest.mark.parametrize("backend", ["eager", "native"])
@pytest.mark.parametrize("planned", [False, True])
@pytest.mark.parametrize("name", ["none", "ngram", "model"])
def test_a_text_is_the_same_alone_and_among_rows_that_come_and_go(
    name: str, planned: bool, backend: str, tiny_model_folder: Path
) -> None:
    if backend == "native":
        pytest.importorskip("redwood._native", reason="installed without a compiler")
    rng = np.random.default_rng(3)
    drafter = _drafters()[name]()
    kinds: list[dict[str, Any]] = [
        {},
        {"temperature": 0.8, "seed": 5},
        {"repetition_penalty": 1.4},
        {"temperature": 1.2, "seed": 6, "top_p": 0.9},
        {"temperature": 0.7, "seed": 8, "verifier": "traversal"},
    ]
    asked = [
        (
            rng.integers(2, 200, int(rng.integers(1, 70))).tolist(),
            SamplingParams(max_tokens=int(rng.integers(1, 40)), **kinds[i % len(kinds)]),
        )
        for i in range(15)
    ]

    def engine() -> RowEngine:
        target = _target()
        if backend == "native":
            target = load_native(tiny_model_folder, None, threads=2)
        planner = make_planner(target, drafter) if planned else None
        return RowEngine(
            target,
            drafter,
            eos_ids=[1],
            budget=5,
            planner=planner,
            max_rows=4,
            prefill_beside=16,
            kv_tokens=300,
        )

    busy, keys, made = engine(), [], dict[int, list[int]]()
    for prompt, params in asked:
        keys.append(busy.add(prompt, params))
        for step in busy.step() if rng.random() < 0.7 else ():
            made.setdefault(step.request, []).extend(step.token_ids)
        if rng.random() < 0.2:
            busy.cancel(busy.add(PROMPTS[3], SamplingParams(max_tokens=9)))
    for key, steps in _drain(busy).items():
        made.setdefault(key, []).extend(_tokens(steps))
    for key, (prompt, params) in zip(keys, asked, strict=True):
        alone = engine()
        alone.add(prompt, params)
        assert made[key] == _tokens(next(iter(_drain(alone).values())))


def _explode(ids: Tensor, scores: Tensor) -> Tensor:
    if ids.shape[1] > 5:
        raise RuntimeError("a processor's own fault")
    return scores


def _forbid(ids: Tensor, scores: Tensor) -> Tensor:
    return torch.full_like(scores, -torch.inf) if ids.shape[1] > 5 else scores


@pytest.mark.parametrize("planned", [False, True])
@pytest.mark.parametrize("fault", ["processor", "nothing left"])
def test_a_fault_of_one_row_ends_that_row_alone(fault: str, planned: bool) -> None:
    want = Engine(_target(), eos_ids=[1], budget=1).generate(PROMPTS, max_tokens=20)
    assert isinstance(want, list)
    drafter = NgramDrafter()
    target = _target()
    planner = make_planner(target, drafter) if planned else None
    engine = RowEngine(target, drafter, eos_ids=[1], budget=4, planner=planner)
    wrong = {"processor": _explode, "nothing left": _forbid}[fault]
    keys = [
        engine.add(
            prompt,
            SamplingParams(max_tokens=20, logits_processor=wrong if prompt == [77] else None),
        )
        for prompt in PROMPTS
    ]
    made = _drain(engine)
    for key, prompt, output in zip(keys, PROMPTS, want, strict=True):
        if prompt == [77]:
            last = made[key][-1]
            assert last.finish_reason == "error" and last.error is not None
            assert last.token_ids == []
        else:
            assert _tokens(made[key]) == output.token_ids
    # Nothing is left of the row: the engine goes on.
    assert not engine.busy
    engine.add(PROMPTS[0], SamplingParams(max_tokens=20))
    assert _tokens(next(iter(_drain(engine).values()))) == want[0].token_ids


def test_generate_raises_what_ended_its_request() -> None:
    engine = Engine(_target(), NgramDrafter(), budget=4)
    with pytest.raises(RuntimeError, match="own fault"):
        engine.generate(PROMPTS[2], max_tokens=30, logits_processor=_explode)
    assert not engine.busy


@pytest.mark.parametrize(
    "params", [{}, {"temperature": 0.8, "seed": 3}, {"repetition_penalty": 1.5, "top_k": 4}]
)
def test_logprobs_are_those_of_plain_decoding(params: dict[str, Any]) -> None:
    plain: Any = Engine(_target(), budget=1).generate(
        PROMPTS[0], max_tokens=30, ignore_eos=True, logprobs=3, **params
    )
    drafted: Any = Engine(_target(), _drafters()["model"](), budget=9).generate(
        PROMPTS[0], max_tokens=30, ignore_eos=True, logprobs=3, **params
    )
    assert drafted.stats.num_accepted_tokens > 0
    assert len(plain.logprobs) == len(drafted.logprobs) == len(drafted.token_ids) == 30
    for one, other in zip(plain.logprobs, drafted.logprobs, strict=True):
        assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
        assert [token for token, _ in one.top] == [token for token, _ in other.top]
        assert len(one.top) == 3 and one.top[0][1] >= one.top[1][1] >= one.top[2][1]


def test_logprobs_are_the_models_own_law() -> None:
    target = _target()
    output: Any = Engine(target, budget=1).generate(PROMPTS[0], max_tokens=4, logprobs=0)
    text = PROMPTS[0] + output.token_ids
    with torch.no_grad():
        rows = tiny_llama()(torch.tensor([text])).logits[0].double().log_softmax(-1)
    for i, entry in enumerate(output.logprobs):
        at = len(PROMPTS[0]) - 1 + i
        assert entry.logprob == pytest.approx(float(rows[at, text[at + 1]]), abs=1e-4)
        assert entry.top == []
    with pytest.raises(ArgumentError, match="logprobs"):
        SamplingParams(logprobs=21)


def test_pytorch_keeps_to_one_thread_beside_kernels_with_their_own(tiny_model_folder: Path) -> None:
    seen: list[int] = []

    class Watching(NgramDrafter):
        def propose(self, contexts: Any, budgets: Any) -> Any:
            seen.append(torch.get_num_threads())
            return super().propose(contexts, budgets)

    own, shared = load_native(tiny_model_folder, None), _target()
    cases: list[tuple[Any, Any, int]] = [
        (own, [Watching()], 1),
        (own, [Watching(), ModelDrafter(load_native(tiny_model_folder, None))], 1),
        (own, [Watching(), ModelDrafter(shared)], 2),
        (own, [Watching(), _Somebodys()], 2),
        (shared, [Watching()], 2),
    ]
    torch.set_num_threads(2)
    try:
        for backend, parts, want in cases:
            engine = RowEngine(backend, UnionDrafter(parts), budget=4)
            engine.add([5, 6, 5, 6], SamplingParams(max_tokens=4, temperature=0.0))
            seen.clear()
            while engine.busy:
                engine.step()
            assert set(seen) == {want}
            assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


class _Somebodys:
    """A drafter that may want PyTorch's threads."""

    name = "somebody's"
    draws = False

    def propose(self, contexts: Sequence[Context], budgets: Sequence[int]) -> list[TokenTree]:
        return [TokenTree.chain(context.token_ids[-1:]) for context in contexts]

    def release(self, key: int) -> None:
        pass
