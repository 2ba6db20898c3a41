"""Measuring: turns, comparisons, margins. How long things take is not tested."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import redwood
from redwood import Engine, NgramDrafter, SamplingParams, TokenTree
from redwood.backends.base import Nodes
from redwood.bench import interleave
from redwood.bench.interleave import PLAIN, Candidate, Run, Stepper, alternate, run, run_interleaved
from redwood.bench.report import comparable, first_difference, forward_times, quartiles, reports
from redwood.drafters.context import Context
from redwood.engine.stats import Stats
from redwood.errors import ArgumentError, CapacityError
from redwood.sampling import GumbelNoise

PARAMS = SamplingParams(max_tokens=12)
PROMPTS = [[5, 6, 7, 5, 6, 7, 5], [9, 9, 9], [40]]


@pytest.fixture(scope="module")
def engine(tiny_model_folder: Path) -> Engine:
    return redwood.load(str(tiny_model_folder))


def ngram(budget: int = 6) -> Candidate:
    return Candidate("ngram", NgramDrafter(), budget)


class Diary:
    """A drafter that proposes nothing and writes down when it was asked for a new request."""

    draws = False

    def __init__(self, name: str, diary: list[str]) -> None:
        self.name, self._diary, self._seen = name, diary, set[int]()

    def propose(self, contexts: Sequence[Context], budgets: Sequence[int]) -> list[TokenTree]:
        for context in contexts:
            if context.key not in self._seen:
                self._seen.add(context.key)
                self._diary.append(self.name)
        return [TokenTree.chain(context.token_ids[-1:]) for context in contexts]

    def release(self, key: int) -> None:
        pass


@pytest.mark.parametrize("together", [False, True])
def test_contenders_take_turns_in_rotating_order_after_a_warm_up(
    engine: Engine, together: bool
) -> None:
    diary: list[str] = []
    candidates = [Candidate(name, Diary(name, diary), 2) for name in "abc"]
    counted: list[int] = []
    alternate(
        engine,
        candidates,
        PROMPTS[:2],
        PARAMS,
        repeats=2,
        together=together,
        on_run=lambda: counted.append(1),
    )
    assert "".join(diary) == "abc" + "abc" + "bca" + "cab" + "abc"
    assert len(counted) == 12


def test_the_next_step_is_of_whoever_had_least_time(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, asked = [0.0], list[str]()

    class Slow(NgramDrafter):
        def __init__(self, name: str, seconds: float) -> None:
            super().__init__()
            self.name, self._seconds = name, seconds

        def propose(self, contexts: Sequence[Context], budgets: Sequence[int]) -> list[TokenTree]:
            asked.append(self.name)
            now[0] += self._seconds
            return [TokenTree.chain(context.token_ids[-1:]) for context in contexts]

    monkeypatch.setattr(interleave, "perf_counter", lambda: now[0])
    lanes = [Stepper(engine, Candidate(n, Slow(n, s), 2)) for n, s in (("a", 1.0), ("b", 2.5))]
    ended: list[float] = []
    params = SamplingParams(max_tokens=6, ignore_eos=True)
    run_interleaved(lanes, PROMPTS[:1], params, lambda: ended.append(now[0]))
    assert "".join(asked) == "abaabaabbb"  # nothing is drafted for a last token
    assert [lane.seconds for lane in lanes] == [5.0, 12.5] and len(ended) == 2
    assert lanes[0].texts == lanes[1].texts and len(lanes[0].texts[0]) == 6


def test_contenders_may_share_a_drafter_and_the_engine_is_left_alone(engine: Engine) -> None:
    before, shared = (engine.drafter, engine.budget), NgramDrafter()
    candidates = [PLAIN, Candidate("few", shared, 2), Candidate("many", shared, 6)]
    plain, few, many = alternate(engine, candidates, PROMPTS, SamplingParams(max_tokens=40))
    texts = [run.token_ids for (run,) in plain]
    assert [run.token_ids for (run,) in few] == [run.token_ids for (run,) in many] == texts
    assert (engine.drafter, engine.budget) == before and not engine.busy


def test_a_prompt_that_does_not_fit_is_refused_as_everywhere(engine: Engine) -> None:
    long = [5] * (engine.target.capacity + 1)
    for prompts in ([long], [PROMPTS[0], long]):
        lanes = [Stepper(engine, PLAIN), Stepper(engine, ngram())]
        with pytest.raises(CapacityError):
            run_interleaved(lanes, prompts, PARAMS)
        assert not any(lane.engine.busy for lane in lanes)
        with pytest.raises(CapacityError):
            alternate(engine, [PLAIN, ngram()], prompts, PARAMS)


def test_a_run_that_fails_frees_its_rows(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(nodes: Any) -> Any:
        raise RuntimeError("no power")

    monkeypatch.setattr(engine.target, "extend", broken)
    lanes = [Stepper(engine, PLAIN), Stepper(engine, ngram())]
    with pytest.raises(RuntimeError, match="no power"):
        run_interleaved(lanes, PROMPTS[:1], PARAMS)
    assert not any(lane.engine.busy for lane in lanes)


@pytest.mark.parametrize("sampled", [{}, {"temperature": 0.8, "seed": 4}])
def test_drafts_give_the_plain_text_and_the_report_says_so(
    engine: Engine, sampled: dict[str, float]
) -> None:
    params = SamplingParams(max_tokens=12, **sampled)
    candidates = [PLAIN, ngram(6), ngram(1)]
    runs = alternate(engine, candidates, PROMPTS, params, repeats=2)
    made = reports(engine, candidates, PROMPTS, params, runs)
    assert [report.drafter for report in made] == ["none", "ngram", "ngram"]
    assert [report.budget for report in made] == [1, 6, 1]
    for report in made:
        assert report.identical is True and report.num_identical == report.num_prompts == 3
        assert report.num_differences == report.num_near_ties == 0
        assert report.differences == []
        low, high = report.tokens_per_s_spread
        assert 0 < low <= report.tokens_per_s <= high
        assert set(report.ms_per_pass) == {"draft", "target", "verify", "other"}
    assert made[0].ratio_to_plain == 1.0
    assert made[0].mean_acceptance_length == 1.0
    assert made[1].mean_acceptance_length >= 1.0


def test_nothing_is_compared_when_sampling_without_a_seed(engine: Engine) -> None:
    params = SamplingParams(max_tokens=8, temperature=1.0)
    runs = alternate(engine, [PLAIN, ngram()], PROMPTS[:1], params)
    for report in reports(engine, [PLAIN, ngram()], PROMPTS[:1], params, runs):
        assert report.identical is None and report.num_identical is None
        assert report.num_differences is None and report.num_near_ties is None


def test_what_is_comparable() -> None:
    assert comparable(SamplingParams())
    assert comparable(SamplingParams(temperature=1.0, seed=1))
    assert not comparable(SamplingParams(temperature=1.0))
    assert not comparable(SamplingParams(temperature=1.0, seed=1, verifier="traversal"))


def test_speeds_are_medians_over_prompts_of_medians_over_repeats(engine: Engine) -> None:
    def answer(tokens_per_s: float) -> Run:
        stats = Stats(num_generated_tokens=10, target_passes=5)
        stats.seconds["target"] = 10 / tokens_per_s
        stats.seconds["prefill"] = 100.0  # does not count
        return Run([1] * 10, stats)

    plain = [[answer(10), answer(20), answer(10)], [answer(20)] * 3, [answer(10)] * 3]
    other = [[answer(30), answer(30), answer(90)], [answer(40)] * 3, [answer(50)] * 3]
    report = reports(engine, [PLAIN, ngram()], PROMPTS, PARAMS, [plain, other])[1]
    assert report.tokens_per_s == pytest.approx(40)
    assert report.ratio_to_plain == pytest.approx(3)  # of 3 (median of 3, 1.5, 9), 2 and 5
    assert report.ratio_spread == pytest.approx((2.5, 4.0))
    assert report.mean_acceptance_length == 2.0


def test_a_difference_has_its_position_and_the_margin_of_plain_decoding(engine: Engine) -> None:
    prompt = PROMPTS[0]
    plain = run(engine, PLAIN, prompt, PARAMS).token_ids
    changed = [*plain[:4], (plain[4] + 1) % 300, *plain[5:]]
    found = first_difference(engine, prompt, PARAMS, plain, changed, 7)
    assert found is not None
    assert (found.prompt, found.position) == (7, 4)
    assert (found.plain_token, found.token) == (plain[4], changed[4])
    best, second = _logits(engine, [*prompt, *plain[:4]]).double().topk(2).values.tolist()
    assert found.margin == pytest.approx(best - second, abs=1e-4)
    assert found.near_tie is False
    assert first_difference(engine, prompt, PARAMS, plain, plain) is None


def test_the_margin_of_seeded_decoding_counts_its_noise(engine: Engine) -> None:
    prompt, params = PROMPTS[0], SamplingParams(max_tokens=5, temperature=0.7, seed=3)
    plain = run(engine, PLAIN, prompt, params).token_ids
    found = first_difference(engine, prompt, params, plain, [*plain[:2], 299 - plain[2]])
    assert found is not None and found.margin is not None
    tokens = [*prompt, *plain[:2]]
    keys = (_logits(engine, tokens).double() / 0.7).log_softmax(-1)
    keys += torch.from_numpy(GumbelNoise(3, 300)(len(tokens)))
    assert int(keys.argmax()) == plain[2]  # the choice that plain decoding made
    best, second = keys.topk(2).values.tolist()
    assert found.margin == pytest.approx(best - second, abs=1e-4)


def test_a_tie_is_near_and_a_lone_choice_has_no_margin(engine: Engine) -> None:
    logits = _logits(engine, PROMPTS[1])
    first, second = logits.topk(2).indices.tolist()
    bias = {second: float(logits[first] - logits[second])}
    tied = SamplingParams(max_tokens=1, logit_bias=bias)
    found = first_difference(engine, PROMPTS[1], tied, [first], [second])
    assert found is not None and found.near_tie and found.margin == pytest.approx(0.0, abs=1e-4)
    alone = SamplingParams(max_tokens=1, temperature=1.0, top_k=1, seed=1)
    found = first_difference(engine, PROMPTS[1], alone, [first], [second])
    assert found is not None and found.margin is None and not found.near_tie


def test_an_answer_that_ends_early_differs_where_it_ends(engine: Engine) -> None:
    found = first_difference(engine, PROMPTS[0], PARAMS, [8, 9, 10], [8, 9])
    assert found is not None
    assert (found.position, found.plain_token, found.token) == (2, 10, None)


def test_a_wrong_answer_in_any_repeat_is_counted(engine: Engine) -> None:
    runs = alternate(engine, [PLAIN, ngram()], PROMPTS, PARAMS, repeats=2)
    wrong = runs[1][1][1]
    runs[1][1][1] = Run([(wrong.token_ids[0] + 1) % 300, *wrong.token_ids[1:]], wrong.stats)
    plain, other = reports(engine, [PLAIN, ngram()], PROMPTS, PARAMS, runs)
    assert plain.identical is True
    assert other.identical is False
    assert (other.num_identical, other.num_differences) == (2, 1)
    assert [(d.prompt, d.position) for d in other.differences] == [(1, 0)]


@pytest.mark.parametrize(
    ("budget", "prompts", "repeats", "error"),
    [
        (0, PROMPTS, 1, ArgumentError),
        (300, PROMPTS, 1, CapacityError),
        (4, [], 1, ArgumentError),
        (4, PROMPTS, 0, ArgumentError),
    ],
)
def test_wrong_benchmarks_are_refused_before_they_run(
    engine: Engine, budget: int, prompts: list[list[int]], repeats: int, error: type[Exception]
) -> None:
    with pytest.raises(error):
        alternate(engine, [PLAIN, ngram(budget)], prompts, PARAMS, repeats=repeats)


@pytest.mark.parametrize("backend", ["native", "eager"])
def test_forward_times_have_a_median_per_number_of_tokens(
    tiny_model_folder: Path, backend: str
) -> None:
    target = redwood.load(str(tiny_model_folder), backend=backend).target
    times = forward_times(target, [4, 1, 4], context=600 // 4, repeats=3)
    assert list(times.ms) == [1, 4]
    for count, ms in times.ms.items():
        low, high = times.spread[count]
        assert 0 < low <= ms <= high
    assert (times.backend, times.dtype, times.device) == (backend, "float32", "cpu")
    assert (times.context, times.repeats) == (150, 3)


def test_forward_times_take_turns_on_one_row_that_is_cut_back_and_freed(engine: Engine) -> None:
    class Watched:
        name, vocab_size, capacity, device = "watched", 300, 64, torch.device("cpu")

        def __init__(self) -> None:
            self.calls: list[str] = []

        def open(self) -> int:
            self.calls.append("open")
            return 1

        def extend(self, rows: Sequence[Nodes]) -> list[torch.Tensor]:
            count = len(rows[0].token_ids)
            self.calls.append(f"extend {count}")
            return [torch.zeros(count, 300)]

        def commit(self, rows: object) -> None:
            self.calls.append("commit")

        def truncate(self, row: int, length: int) -> None:
            self.calls.append(f"truncate {length}")

        def release(self, row: int) -> None:
            self.calls.append("release")

    watched = Watched()
    forward_times(watched, [1, 2], context=8, repeats=1)  # type: ignore[arg-type]
    assert watched.calls[:3] == ["open", "extend 8", "commit"]
    assert watched.calls[-1] == "release"
    timed = watched.calls[3:-1]
    assert timed[1::2] == ["truncate 8"] * 6
    assert timed[::2] == [f"extend {n}" for n in (1, 2, 2, 1, 1, 2)]


@pytest.mark.parametrize(
    ("counts", "context", "repeats", "error"),
    [
        ([], 0, 1, ArgumentError),
        ([0], 0, 1, ArgumentError),
        ([1], -1, 1, ArgumentError),
        ([1], 0, 0, ArgumentError),
        ([2], 255, 1, CapacityError),
    ],
)
def test_wrong_forward_benchmarks_are_refused(
    engine: Engine, counts: list[int], context: int, repeats: int, error: type[Exception]
) -> None:
    with pytest.raises(error):
        forward_times(engine.target, counts, context=context, repeats=repeats)


def test_quartiles() -> None:
    assert quartiles([3.0]) == (3.0, 3.0)
    assert quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == (2.0, 4.0)


def _logits(engine: Engine, tokens: Sequence[int]) -> torch.Tensor:
    row = engine.target.open()
    try:
        return engine.target.extend([Nodes(row, list(np.array(tokens)), num_logits=1)])[0][0]
    finally:
        engine.target.release(row)
