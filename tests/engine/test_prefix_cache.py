"""Texts that stay: the same answers as without, found where they should be, never past a wall."""

from __future__ import annotations

import random

import pytest

from decoder_kit import tiny_model
from redwood.backends.native.backend import NativeBackend
from redwood.backends.native.load import load_native
from redwood.engine.engine import RowEngine
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


def test_backends_that_cannot_share_keep_nothing_and_bounds_are_checked() -> None:
    engine = RowEngine(TableBackend(90, capacity=512), kv_cache=64 * MIB)
    assert not engine.prefixes.on
    _answers(engine, [TEXT])
    assert _answers(engine, [TEXT])[1] == [0]
    with pytest.raises(ArgumentError, match="kv_cache"):
        RowEngine(TableBackend(90, capacity=512), kv_cache=-1)
    with pytest.raises(ArgumentError, match="cache_salt"):
        SamplingParams(cache_salt=3)  # type: ignore[arg-type]


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
