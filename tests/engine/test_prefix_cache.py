"""Texts that stay: the same answers as without, found where they should be, never past a wall."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

import redwood
from conftest import tiny_llama
from decoder_kit import tiny_model
from redwood.backends.base import AcceptedPath, Nodes
from redwood.backends.eager.backend import ATTENTION, EagerBackend
from redwood.backends.native.backend import NativeBackend
from redwood.backends.native.load import load_native
from redwood.drafters.base import ModelDrafter, NgramDrafter, join_drafters
from redwood.engine import load as load_module
from redwood.engine.engine import RowEngine
from redwood.engine.load import cache_bytes
from redwood.engine.scheduler import chunks
from redwood.errors import ArgumentError
from redwood.sampling import SamplingParams
from redwood.testing import TableBackend

MIB = 1 << 20
TEXT = [(7 * i + i * i // 3) % 90 for i in range(300)]


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> NativeBackend:
    folder = tmp_path_factory.mktemp("native")
    tiny_model("llama", max_position_embeddings=1024).save_pretrained(folder)
    return load_native(folder, None, threads=1)


def _answers(
    engine: RowEngine, prompts: list[list[int]], salt: str = "", tokens: int = 8
) -> tuple[list[list[int]], list[int]]:
    """Answers, and tokens of each prompt that were not read again."""
    params = SamplingParams(max_tokens=tokens, ignore_eos=True, cache_salt=salt)
    keys = [engine.add(prompt, params) for prompt in prompts]
    stats, made = [engine.stats(key) for key in keys], {key: list[int]() for key in keys}
    while engine.busy:
        for step in engine.step():
            made[step.request] += step.token_ids
    return [made[key] for key in keys], [each.num_cached_tokens for each in stats]


def test_a_second_turn_reads_only_what_is_new(target: NativeBackend) -> None:
    engine = RowEngine(target, kv_cache=64 * MIB)
    (answer,), _ = _answers(engine, [TEXT])
    turn = [*TEXT, *answer, 3, 4, 5]
    again, cached = _answers(engine, [turn])
    assert cached == [len(TEXT) + len(answer) - 1]  # the last token's were never computed
    assert again == _answers(RowEngine(target), [turn])[0]
    assert _answers(engine, [turn])[1] == [len(turn) - 1]
    engine.prefixes.clear()
    assert target.cache_bytes == 0


def test_requests_that_come_together_read_their_beginning_once(target: NativeBackend) -> None:
    engine = RowEngine(target, kv_cache=64 * MIB, prefill_chunk=64)
    prompts = [TEXT + [i] * (i + 1) for i in range(6)] + [TEXT, TEXT]
    answers, cached = _answers(engine, prompts)
    assert answers == _answers(RowEngine(target), prompts)[0]
    assert sum(count >= len(TEXT) - 1 for count in cached) == len(prompts) - 1
    engine.prefixes.clear()
    assert target.cache_bytes == 0


def test_other_salts_see_nothing(target: NativeBackend) -> None:
    engine = RowEngine(target, kv_cache=64 * MIB)
    _answers(engine, [TEXT], salt="a")
    assert _answers(engine, [TEXT], salt="b")[1] == [0]
    assert _answers(engine, [TEXT], salt="a")[1] == [len(TEXT) - 1]
    engine.prefixes.clear()


def test_the_bound_holds_and_the_least_recently_used_goes(target: NativeBackend) -> None:
    page = 64 * target.token_bytes
    engine = RowEngine(target, kv_cache=6 * page)
    texts = [[10 * i + 1, *TEXT[:100]] for i in range(4)]
    for text in texts:
        _answers(engine, [text])
        assert target.cache_bytes <= 6 * page
    assert engine.prefixes.num_evictions == 1
    assert _answers(engine, [texts[1]])[1] == [100]
    assert _answers(engine, [texts[0]])[1] == [0]
    _answers(engine, [[89, *TEXT, *TEXT]])  # more than the bound: its beginning stays
    assert 0 < target.cache_bytes <= 6 * page
    engine.prefixes.clear()
    assert target.cache_bytes == 0


def test_what_stays_goes_when_rows_need_the_room(target: NativeBackend) -> None:
    engine = RowEngine(target, kv_cache=64 * MIB, kv_tokens=400)
    _answers(engine, [TEXT])
    other = [88, *TEXT]
    answers, _ = _answers(engine, [other])
    assert engine.prefixes.num_evictions == 1
    assert answers == _answers(RowEngine(target), [other])[0]
    engine.prefixes.clear()
    # Five answers to one prompt fit, since its pages count once: together they would not.
    engine = RowEngine(target, kv_cache=64 * MIB, kv_tokens=4 * 310)
    answers, _ = _answers(engine, [other] * 5)
    assert answers == _answers(RowEngine(target), [other])[0] * 5
    engine.prefixes.clear()


def test_random_histories_say_what_is_said_without(target: NativeBackend) -> None:
    plain: dict[tuple[int, ...], list[int]] = {}
    for seed in range(25):
        rng = random.Random(seed)
        pages = rng.choice([3, 12, 200])
        engine = RowEngine(
            target,
            kv_cache=pages * 64 * target.token_bytes,
            kv_tokens=rng.choice([None, 500]),
            prefill_chunk=rng.choice([8, 64]),
            max_rows=3,
        )
        asked: dict[int, tuple[int, ...]] = {}
        made: dict[int, list[int]] = {}
        params = SamplingParams(max_tokens=5, ignore_eos=True)
        for _ in range(30):
            prompt = (
                *TEXT[: rng.choice([5, 70, 128, 200])],
                *[rng.randrange(3)] * rng.choice([0, 2, 90]),
            )
            if rng.random() < 0.4:
                key = engine.add(prompt, params)
                asked[key], made[key] = prompt, []
            elif asked and rng.random() < 0.1:
                engine.cancel(gone := rng.choice(list(asked)))
                made.pop(gone, None)
            for step in engine.step():
                assert step.error is None
                made.get(step.request, []).extend(step.token_ids)
        while engine.busy:
            for step in engine.step():
                made.get(step.request, []).extend(step.token_ids)
        for key, tokens in made.items():
            prompt = asked[key]
            if prompt not in plain:
                plain[prompt] = _answers(RowEngine(target), [list(prompt)], tokens=5)[0][0]
            assert tokens == plain[prompt]
        engine.prefixes.clear()
        assert target.cache_bytes == 0


class _Only:
    """A backend of one's own, with the methods that it must have and no more."""

    _NAMES = ("name", "vocab_size", "capacity", "device", "open", "extend", "commit", "length")

    def __init__(self, backend: TableBackend) -> None:
        for name in (*self._NAMES, "truncate", "release"):
            setattr(self, name, getattr(backend, name))


def test_backends_that_cannot_share_keep_nothing_and_bounds_are_checked() -> None:
    unshared: Any = _Only(TableBackend(90, capacity=512))
    engine = RowEngine(unshared, kv_cache=64 * MIB)
    assert not engine.prefixes.on
    _answers(engine, [TEXT])
    assert _answers(engine, [TEXT])[1] == [0]
    with pytest.raises(ArgumentError, match="kv_cache"):
        RowEngine(TableBackend(90, capacity=512), kv_cache=-1)
    with pytest.raises(ArgumentError, match="cache_salt"):
        SamplingParams(cache_salt=3)  # type: ignore[arg-type]


def test_a_leader_that_is_cancelled_costs_those_that_wait_for_it_nothing() -> None:
    target = TableBackend(90, capacity=512, order=512)
    engine = RowEngine(target, kv_cache=MIB, prefill_chunk=16)
    params = SamplingParams(max_tokens=5, ignore_eos=True)
    leader, *others = [engine.add([*TEXT, i], params) for i in range(3)]
    made = {key: list[int]() for key in others}
    for _ in range(4):
        assert engine.step() == []
    engine.cancel(leader)
    stats = [engine.stats(key) for key in others]
    while engine.busy:
        for step in engine.step():
            made[step.request] += step.token_ids
    right, _ = _answers(RowEngine(target), [[*TEXT, 1], [*TEXT, 2]], tokens=5)
    assert list(made.values()) == right
    assert stats[0].num_cached_tokens >= 64  # what the leader had read
    engine.prefixes.clear()
    assert target.num_rows == 0


class _Scarce(TableBackend):
    """Memory runs out at one pass."""

    fails_at, calls = 0, 0

    def extend(self, rows: Any) -> Any:
        self.calls += 1
        if self.calls == self.fails_at:
            raise MemoryError
        return super().extend(rows)


@pytest.mark.parametrize("at", range(1, 12))
def test_memory_that_runs_out_while_pages_are_shared_loses_nothing(at: int) -> None:
    target = _Scarce(90, capacity=512, order=512)
    engine = RowEngine(target, kv_cache=MIB, prefill_chunk=64)
    _answers(engine, [TEXT[:100]])
    target.fails_at = target.calls + at
    try:
        _answers(engine, [[*TEXT[:90], i, i] for i in range(3)])
    except MemoryError:
        assert not engine.busy and target.num_rows == 0
    target.fails_at = 0
    prompts = [[*TEXT[:90], i, i] for i in range(3)]
    assert _answers(engine, prompts)[0] == _answers(RowEngine(target), prompts)[0]


@pytest.mark.parametrize("joined", [False, True])
def test_memory_that_runs_out_frees_what_draft_models_keep_too(joined: bool) -> None:
    target, small = _Scarce(90, capacity=512), TableBackend(90, seed=1, capacity=512, order=512)
    model = ModelDrafter(small)
    assert model.keep(MIB)
    drafter = join_drafters([model, NgramDrafter()]) if joined else model
    engine = RowEngine(target, drafter, budget=4, kv_cache=MIB)
    _answers(engine, [TEXT[:100]])
    assert small.num_rows == 1
    target.fails_at = target.calls + 2
    with pytest.raises(MemoryError):
        _answers(engine, [TEXT[100:200]])
    assert target.num_rows == small.num_rows == 0
    target.fails_at = 0
    assert _answers(engine, [TEXT[:100]])[0] == _answers(RowEngine(target), [TEXT[:100]])[0]


def test_a_template_that_changes_the_past_shares_less_and_nothing_is_wrong() -> None:
    target = TableBackend(90, capacity=512, order=512)
    engine = RowEngine(target, kv_cache=MIB)
    (answer,), _ = _answers(engine, [TEXT[:120]])
    changed = [*TEXT[:60], 89, *TEXT[62:120], *answer, 1, 2]
    assert _answers(engine, [changed]) == (_answers(RowEngine(target), [changed])[0], [60])


class _Counting(TableBackend):
    """Counts tokens that it computes."""

    read = 0

    def extend(self, rows: Any) -> Any:
        self.read += sum(len(nodes.token_ids) for nodes in rows)
        return super().extend(rows)


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize(
    "how",
    [{}, {"temperature": 0.8, "seed": 3}, {"temperature": 0.8, "seed": 3, "verifier": "traversal"}],
    ids=["greedy", "coupled", "traversal"],
)
def test_draft_models_reuse_their_own_and_say_the_same(
    window: int | None, how: dict[str, Any]
) -> None:
    said, read = list[list[list[int]]](), list[int]()
    for kept in (0, MIB):
        target = TableBackend(90, seed=1, capacity=512)
        small = _Counting(90, seed=1, capacity=512, spread=1.5)
        drafter = ModelDrafter(small, window=window)
        assert drafter.keep(kept) == (kept > 0)
        engine = RowEngine(target, drafter, budget=5)
        params = SamplingParams(max_tokens=12, ignore_eos=True, **how)
        text, answers = TEXT[:100], list[list[int]]()
        for turn in range(3):
            key, made = engine.add(text, params), list[int]()
            while engine.busy:
                for step in engine.step():
                    made += step.token_ids
            assert key and len(made) == 12
            answers.append(made)
            text = [*text, *made, turn, 5, 6]
        said.append(answers)
        read.append(small.read)
        drafter.keep(0)
        assert small.num_rows == 0
    assert said[0] == said[1]
    moves = window is not None and how.get("verifier") == "traversal"  # the window's start counts
    assert read[1] == read[0] if moves else read[1] < read[0] - 40


def test_copied_slots_are_reused_up_to_rounding() -> None:
    model = tiny_llama(max_position_embeddings=512)
    model.set_attn_implementation(ATTENTION)
    target = EagerBackend(model, 512)
    engine = RowEngine(target, kv_cache=64 * MIB, prefill_chunk=64)
    (answer,), _ = _answers(engine, [TEXT])
    turn = [*TEXT, *answer, 3, 4, 5]
    again, cached = _answers(engine, [turn])
    assert cached == [len(TEXT) + len(answer) - 1]
    assert again == _answers(RowEngine(target), [turn])[0]
    row = target.fork(next(entry.row for _, entry in engine.prefixes.kept()), 200)
    own = target.open()
    target.extend([Nodes(own, TEXT[:200], num_logits=0)])
    target.commit([AcceptedPath(own, range(200))])
    (forked,), (read,) = (target.extend([Nodes(each, [7])]) for each in (row, own))
    assert torch.allclose(forked, read, atol=1e-4)
    assert target.pages([row]) == target.pages([own]) == 4
    with pytest.raises(ArgumentError, match="fork"):
        target.fork(own, 201)
    for each in (row, own):
        target.release(each)
    engine.prefixes.clear()
    assert not target._rows


def test_backends_that_round_keep_texts_only_if_told_to(tiny_model_folder: Path) -> None:
    how: dict[str, Any] = dict(backend="eager", dtype="float32")
    assert not redwood.load(tiny_model_folder, None, **how).prefixes.on
    assert not redwood.load(tiny_model_folder, None, kv_cache_share=0.1, **how).prefixes.on
    engine = redwood.load(tiny_model_folder, None, kv_cache="8MiB", **how)
    assert engine.prefixes.on and engine.prefixes.max_pages > 100
    with pytest.raises(ArgumentError, match=r"kv_cache 0\.3: the eager backend .* a size alone"):
        redwood.load(tiny_model_folder, None, kv_cache=0.3, **how)


def test_what_was_asked_for_and_cannot_stay_is_refused_and_a_default_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sharing = TableBackend(90, capacity=512)
    unshared: Any = _Only(sharing)
    for asked in (0.3, "1MiB", 4096):
        with pytest.raises(ArgumentError, match="keeps no keys and values; use 0"):
            cache_bytes(unshared, asked)
    assert [cache_bytes(unshared, none) for none in (None, 0, "0", 0.0)] == [0] * 4
    assert cache_bytes(unshared, None, 0.5) == 0
    assert cache_bytes(sharing, 0.3) > 0
    monkeypatch.setattr(load_module, "free_bytes", lambda: None)
    assert cache_bytes(sharing, None) == 0
    with pytest.raises(ArgumentError, match="is not known here: give a size"):
        cache_bytes(sharing, 0.3)


def test_a_short_prompt_does_not_wait_for_a_long_one_nor_for_ever_the_other_way() -> None:
    engine = RowEngine(TableBackend(90, capacity=512))
    keys = [engine.add(TEXT), engine.add(TEXT[:20])]
    long, short = requests = [engine._requests[key] for key in keys]
    held = {0: 0, 1: 0}
    long.row, short.row = 0, 1
    first = chunks(requests, held.__getitem__, 32)
    assert [(request, len(nodes.token_ids)) for request, nodes in first] == [(short, 19)]
    held[1] = 10  # shorter ones go on coming
    turns = [chunks(requests, held.__getitem__, 32)[0][0] for _ in range(12)]
    assert long in turns
