"""Calibration: acceptance by rank against enumeration, sizes against decoding, a whole profile."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch

import redwood
from redwood import Engine, ModelDrafter, NgramDrafter, SamplingParams, TokenTree
from redwood.bench.acceptance import (
    Text,
    clustered,
    decoded,
    kept_chances,
    position_chances,
    teacher_forced,
)
from redwood.bench.calibrate import calibrate
from redwood.bench.choice import choices, speeds
from redwood.bench.interleave import PLAIN, Candidate, run
from redwood.bench.sizes import tokens_by_size
from redwood.drafters.context import Context
from redwood.errors import ArgumentError, CapacityError
from redwood.profiling.key import profile_key
from redwood.profiling.profile import Profile, ProfileKey
from redwood.testing.enumeration import outcomes
from redwood.verify import recursive

PROMPTS = [[5, 6, 7, 5, 6, 7, 5], [9, 9, 9], [40, 41, 40, 41]]


@pytest.fixture(scope="module")
def engine(tiny_model_folder: Path) -> Engine:
    return redwood.load(str(tiny_model_folder))


@pytest.fixture(scope="module")
def draft(tiny_draft_folder: Path) -> ModelDrafter:
    return ModelDrafter(redwood.load(str(tiny_draft_folder)).target)


def texts(engine: Engine, max_tokens: int = 12) -> list[Text]:
    params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    return [Text(p, run(engine, PLAIN, p, params).token_ids) for p in PROMPTS]


def law(seed: int, size: int, zeros: int = 0) -> np.ndarray:
    made = np.random.default_rng(seed).random(size)
    made[:zeros] = 0.0
    return np.asarray(made / made.sum())


def _tree(draft_probs: np.ndarray, children: Sequence[int]) -> TokenTree:
    count = len(children)
    return TokenTree(
        torch.tensor([0, *children]),
        torch.tensor([-1] + [0] * count),
        torch.tensor([0] + [1] * count, dtype=torch.int8),
        torch.tensor([-1] + [0] * count),
        torch.tensor(draft_probs[None]),
    )


@pytest.mark.parametrize("zeros", [0, 2])
@pytest.mark.parametrize("seed", range(4))
def test_chances_are_those_of_the_published_rule(seed: int, zeros: int) -> None:
    target_probs, draft_probs = law(seed, 4), law(seed + 10, 4, zeros)
    for children in permutations(range(zeros, 4), min(3, 4 - zeros)):
        tree = _tree(draft_probs, children)
        rows = np.tile(target_probs, (len(tree), 1))
        wanted = np.zeros(len(children))
        for chance, accepted in outcomes(recursive, tree, rows):
            if len(accepted.nodes) > 1:
                wanted[accepted.nodes[1] - 1] += chance
        assert kept_chances(target_probs, draft_probs, children) == pytest.approx(wanted, abs=1e-12)


def test_chances_by_hand() -> None:
    target_probs, draft_probs = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.5, 0.3])
    assert kept_chances(target_probs, draft_probs, [1, 0]) == pytest.approx([0.6, 0.4])
    assert kept_chances(target_probs, draft_probs, [1, 2]) == pytest.approx([0.6, 0.0])


def test_a_draft_that_is_used_up_goes_on_evenly() -> None:
    target_probs, draft_probs = np.array([0.0, 0.25, 0.75]), np.array([1.0, 0.0, 0.0])
    chances = kept_chances(target_probs, draft_probs, [0, 1, 2])
    assert chances == pytest.approx([0.0, 0.5, 0.5])


def test_mean_chances_are_the_expectation_over_draws() -> None:
    target, drafted = torch.tensor([0.3, 1.0, -0.5]), torch.tensor([1.0, 0.0, 0.2])
    generator = np.random.default_rng(0)
    found = np.mean(
        [position_chances(target, drafted, 0.7, 2, generator) for _ in range(1000)], axis=0
    )
    p = torch.softmax(target.double() / 0.7, -1).numpy()
    q = torch.softmax(drafted.double() / 0.7, -1).numpy()
    wanted = np.zeros(2)
    for first, second in permutations(range(3), 2):
        chance = q[first] * q[second] / (1.0 - q[first])
        wanted += chance * kept_chances(p, q, [first, second])
    assert found == pytest.approx(wanted, abs=0.04)


def test_at_temperature_0_the_rank_of_the_best_token_counts() -> None:
    target, drafted = torch.tensor([0.0, 0.0, 5.0, 1.0]), torch.tensor([3.0, 0.0, 2.0, 1.0])
    generator = np.random.default_rng(0)
    assert position_chances(target, drafted, 0.0, 3, generator).tolist() == [0.0, 1.0, 0.0]
    assert position_chances(target, drafted[:2], 0.0, 3, generator).tolist() == [0.0] * 3


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_drafter_equal_to_the_target_is_always_right(engine: Engine, temperature: float) -> None:
    along = teacher_forced(engine.target, engine.target, texts(engine), temperature)
    # Above 0 the draft's law is cut to its 256 best tokens of 300.
    assert along.rates[0] == pytest.approx(1.0, abs=1e-3)
    assert sum(along.rates[1:]) == pytest.approx(0.0, abs=1e-3)
    assert along.trials == 36 and along.how == "teacher-forced"
    counted = decoded(engine, engine.target, PROMPTS, temperature, 8)
    assert counted.rates[0] == pytest.approx(1.0)
    assert counted.trials > 0 and counted.how == "decoded"


def test_along_a_text_ranks_are_those_of_each_position(engine: Engine, draft: ModelDrafter) -> None:
    (text, *_) = texts(engine)
    made = teacher_forced(engine.target, draft.backend, [text], 0.0, ranks=3)
    hits = np.zeros(3)
    for at, token in enumerate(text.answer):
        tokens = [*text.prompt, *text.answer[:at]]
        other = redwood.engine.RowEngine(draft.backend)
        best = run(other, PLAIN, tokens, SamplingParams(max_tokens=1, ignore_eos=True)).token_ids
        hits[0] += best == [token]
    assert made.rates[0] == pytest.approx(hits[0] / len(text.answer))


def test_both_ways_of_measuring_agree(engine: Engine, draft: ModelDrafter) -> None:
    along = teacher_forced(engine.target, draft.backend, texts(engine, 60), 0.0, ranks=4)
    counted = decoded(engine, draft.backend, PROMPTS, 0.0, 60, ranks=4)
    for a, b in zip(along.rates, counted.rates, strict=True):
        assert abs(a - b) < 0.2


def test_errors_count_prompts_as_independent() -> None:
    sums, counts = np.array([[8.0, 0.0], [2.0, 0.0]]), np.array([10.0, 10.0])
    made = clustered(sums, counts, "decoded")
    assert made.rates == [0.5, 0.0]
    assert made.stderr == pytest.approx([np.sqrt(2 * 18.0) / 20, 0.0])
    alone = clustered(sums[:1], counts[:1], "decoded")
    assert alone.stderr == pytest.approx([np.sqrt(0.8 * 0.2 / 10), 0.0])
    none = clustered(np.zeros((1, 2)), np.zeros(1), "decoded")
    assert (none.rates, none.stderr, none.trials) == ([0.0, 0.0], [0.0, 0.0], 0)


def test_capacity_ends_what_is_looked_at(engine: Engine, tiny_draft_folder: Path) -> None:
    short = redwood.load(str(tiny_draft_folder), capacity=10).target
    (text, *_) = texts(engine)
    made = teacher_forced(engine.target, short, [text], 0.0)
    assert made.trials == 10 - len(text.prompt)


class Published:
    """An n-gram drafter that learns nothing, so that trees depend on the text alone."""

    name, draws = "published", False

    def __init__(self) -> None:
        self._inner = NgramDrafter()

    def propose(self, contexts: Sequence[Context], budgets: Sequence[int]) -> list[TokenTree]:
        fixed = SamplingParams(temperature=1.0, seed=1, verifier="traversal")
        return self._inner.propose(
            [Context(c.key, c.token_ids, fixed, c.history, c.vocab_size) for c in contexts], budgets
        )

    def release(self, key: int) -> None:
        self._inner.release(key)


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_a_walk_along_the_text_counts_the_passes_of_decoding(engine: Engine, size: int) -> None:
    known = texts(engine, 40)
    walked = tokens_by_size(Published(), known, 0.0, engine.target.vocab_size, sizes=[1, size])
    params = SamplingParams(max_tokens=40, ignore_eos=True)
    candidate = Candidate("", Published(), size)
    stats = [run(engine, candidate, prompt, params).stats for prompt in PROMPTS]
    passes = sum(s.target_passes for s in stats)
    assert walked[size] == pytest.approx(sum(s.num_generated_tokens for s in stats) / passes)
    assert walked[1] == 1.0
    assert tokens_by_size(Published(), [], 0.0, 300) == {}


@pytest.fixture(scope="module")
def profile(engine: Engine, draft: ModelDrafter, tiny_draft_folder: Path) -> Profile:
    told: list[tuple[str, int, int]] = []
    drafters = {"ngram": NgramDrafter(), "small": draft}
    made = calibrate(
        engine,
        drafters,
        PROMPTS,
        key=key_for(drafters),
        max_tokens=10,
        seconds=2.0,
        on_progress=lambda *said: told.append(said),
    )
    assert {what for what, _, of in told} == {what for what, done, of in told if done == of}
    return made


def key_for(drafters: object) -> ProfileKey:
    names = dict.fromkeys(drafters, "")  # type: ignore[call-overload]
    return ProfileKey("tiny", names, "native", "", "auto", "f16", 1, "", "", "cpu", "0")


def test_a_profile_holds_everything(profile: Profile, tmp_path: Path) -> None:
    assert {p.rows for p in profile.target.points} == {1, 2, 4}
    assert profile.step_ms > 0.0
    ngram, small = profile.drafters["ngram"], profile.drafters["small"]
    assert ngram.curve is None and ngram.acceptance == {}
    assert small.curve is not None and small.draft_ms > 0.0
    for at in ("0", "0.6"):
        assert [made.how for made in small.acceptance[at]] == ["teacher-forced", "decoded"]
        assert list(small.tokens_by_size[at]) == [4, 8, 16]
        assert ngram.tokens_by_size[at][1] == 1.0
        assert ngram.reliability[at].keys() == {"cells", "hits", "trials"}
        trials = sum(sum(table["trials"]) for table in small.reliability[at].values())
        assert trials > 0
    assert sum(small.reliability["0.6"]["COUPLED"]["trials"]) > 0
    assert sum(small.reliability["0.6"]["POINT"]["trials"]) == 0
    profile.save(tmp_path / "a.json")
    assert Profile.load(tmp_path / "a.json", profile.key) == profile


def test_what_a_drafter_had_learned_is_given_back(engine: Engine) -> None:
    before = engine.drafter, engine.budget, engine.planner
    drafter = NgramDrafter()
    params = SamplingParams(max_tokens=30, ignore_eos=True)
    run(engine, Candidate("", drafter, 6), PROMPTS[0], params)
    learned = drafter.reliability.to_dict()
    engine.drafter, engine.budget, engine.planner = before
    calibrate(
        engine,
        {"ngram": drafter},
        PROMPTS[:1],
        key=key_for(["ngram"]),
        temperatures=[0.0],
        max_tokens=8,
        seconds=0.1,
    )
    assert drafter.reliability.to_dict() == learned
    assert (engine.drafter, engine.budget, engine.planner) == before and not engine.busy


def test_the_choice_is_the_fastest_of_the_map(profile: Profile) -> None:
    made = {(c.drafter, c.temperature): c for c in choices(profile)}
    assert made.keys() == {(n, t) for n in ("ngram", "small") for t in ("0", "0.6")}
    sizes, levels = range(1, 65), range(1, 9)
    for at in ("0", "0.6"):
        table = np.array(speeds(profile, "small", float(at), sizes, levels))
        best = made["small", at]
        assert best.speedup >= np.nanmax(table) - 1e-9
        assert best.levels is not None
        if best.levels <= 8:
            assert table[best.levels - 1, best.size - 1] == pytest.approx(best.speedup)
        assert made["ngram", at].levels is None and made["ngram", at].speedup >= 1.0


def test_wrong_calibrations_are_refused(engine: Engine) -> None:
    key = key_for([])
    with pytest.raises(ArgumentError, match="prompts and temperatures"):
        calibrate(engine, {}, [], key=key)
    with pytest.raises(ArgumentError, match="not those of the key"):
        calibrate(engine, {"ngram": NgramDrafter()}, PROMPTS, key=key)
    with pytest.raises(ArgumentError, match="temperature -1"):
        calibrate(engine, {}, PROMPTS, key=key, temperatures=[-1.0], seconds=0.0)
    with pytest.raises(CapacityError):
        calibrate(engine, {}, [[5] * 300], key=key, seconds=0.0)


def test_a_key_tells_models_options_and_files_apart(
    engine: Engine, draft: ModelDrafter, tiny_model_folder: Path, tmp_path: Path
) -> None:
    name = str(tiny_model_folder)
    drafters = {"ngram": NgramDrafter(), name: draft}
    key = profile_key(engine.target, name, drafters)
    assert key == profile_key(engine.target, name, dict(reversed(drafters.items())), kv="auto")
    assert key.drafters["ngram"] == "" and key.drafters[name].endswith("vocabulary 300")
    assert key.target.startswith(name)
    assert key != profile_key(engine.target, name, drafters, kv="f32")
    assert key != profile_key(engine.target, name, drafters, cpus=[0])
    eager = redwood.load(name, backend="eager").target
    other = profile_key(eager, name, {})
    assert (other.backend, other.weights, other.kv) == ("eager", "torch.float32", "")
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in tiny_model_folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    before = profile_key(engine.target, str(copy), {})
    (copy / "config.json").write_text((copy / "config.json").read_text() + "\n")
    assert before.difference(profile_key(engine.target, str(copy), {})) is not None
