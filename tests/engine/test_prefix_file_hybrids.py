"""Hybrids' texts over a restart: states from a file give the bits of those that were computed."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_prefix_histories import Plain, history

import redwood
from conftest import save_model, tiny_tokenizer
from hybrids_kit import hybrid_model
from mambas_kit import mamba_model
from redwood.backends.native.backend import NativeBackend
from redwood.backends.native.load import load_native
from redwood.drafters.base import NgramDrafter
from redwood.engine.engine import RowEngine
from redwood.engine.prefix_file import PrefixFile
from redwood.errors import ArgumentError, KvCacheError
from redwood.sampling import SamplingParams
from redwood.table.target import TargetId

pytest.importorskip("redwood._native", reason="installed without a compiler")

PROMPT = [(5 * i + i * i // 7) % 90 + 2 for i in range(150)]
OTHER = [*PROMPT[:100], *PROMPT[20:90]]
HOW: dict[str, Any] = dict(max_tokens=6, ignore_eos=True, logprobs=2, temperature=0.8, seed=4)
MODELS: dict[str, Callable[..., Any]] = {
    "qwen35": hybrid_model,
    "lfm2": hybrid_model,
    "granite-hybrid": mamba_model,
    "mamba2": mamba_model,  # no attention at all
}


def _folder(path: Path, name: str, **changes: Any) -> Path:
    return save_model(path, MODELS[name](name, vocab_size=300, **changes), tiny_tokenizer())


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: _folder(tmp_path_factory.mktemp(name), name) for name in MODELS}


def _load(folder: Path, file: Path | None, **more: Any) -> redwood.Engine:
    how = {"kv_cache": "16MiB", "backend": "native", "threads": 1, "checkpoint_tokens": 16, **more}
    return redwood.load(folder, None, kv_cache_file=file, **how)


def _said(engine: redwood.Engine, prompt: list[int]) -> tuple[Any, int]:
    """Tokens with their log-probabilities, and how many tokens of the prompt were not read."""
    out = engine.generate(prompt, **HOW)
    return (out.token_ids, out.logprobs), out.stats.num_cached_tokens


def _filled(folder: Path, file: Path, **more: Any) -> list[Any]:
    with _load(folder, file, **more) as engine:
        return [_said(engine, each)[0] for each in (PROMPT, OTHER)]


def _target(engine: redwood.Engine) -> NativeBackend:
    assert isinstance(engine.target, NativeBackend)
    return engine.target


def _bytes(backend: NativeBackend, state: Any) -> bytes:
    out = np.empty(backend.state_bytes, np.uint8)
    state.read(out)
    return out.tobytes()


def _held(engine: redwood.Engine) -> dict[tuple[int, ...], dict[int, bytes]]:
    """The states of the texts that are kept."""
    backend = _target(engine)
    return {
        tuple(entry.tokens): {
            at: _bytes(backend, state) for at, state in backend.states_of(entry.row).items()
        }
        for _, entry in engine.prefixes.kept()
    }


@pytest.mark.parametrize("name", MODELS)
def test_a_restart_changes_no_bit(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    file, folder = tmp_path / "kv", folders[name]
    running, plain = _load(folder, file), _load(folder, None, kv_cache=0)
    answers = [_said(running, each)[0] for each in (PROMPT, OTHER)]
    held, pages, size = _held(running), running.prefixes.num_pages, _target(running).cache_bytes
    assert any(length % 16 for states in held.values() for length in states)  # a text's own end
    running.close()
    further = [*OTHER, *answers[1][0], 9, 8, 7]
    branch = [*PROMPT[:121], 5, 5, 5]
    asked = [(PROMPT, 144), (OTHER, 160), (further, len(OTHER) + 5), (branch, 112)]
    with _load(folder, file) as engine:
        assert _held(engine) == held  # all states, bit for bit
        assert engine.prefixes.num_pages == pages and _target(engine).cache_bytes == size
        for prompt, cached in asked:  # the file's states, then those that go on from them
            assert _said(engine, prompt) == (_said(plain, prompt)[0], cached)
        held = _held(engine)
    with _load(folder, file) as engine:  # and what was saved of what was loaded
        assert _held(engine) == held
        assert _said(engine, further) == (_said(plain, further)[0], len(further) - 3)


@pytest.mark.parametrize("name", ["qwen35", "mamba2"])
@pytest.mark.parametrize(
    ("every", "cached"), [(64, (128, 128)), (48, (144, 144)), (0, (0, 0)), (1, (144, 160))]
)
def test_another_distance_takes_the_states_that_it_would_keep(
    name: str, every: int, cached: tuple[int, int], folders: dict[str, Path], tmp_path: Path
) -> None:
    file = tmp_path / "kv"
    answers = _filled(folders[name], file)
    with _load(folders[name], file, checkpoint_tokens=every) as engine:
        for text, states in _held(engine).items():
            assert len(text) - 1 <= max(states) <= len(text)
            assert all(every and at % every == 0 for at in states if at != max(states))
        further = [*PROMPT, *answers[0][0], 9]
        assert _said(engine, further)[1] == len(PROMPT) + 5  # a text's end counts always
        for prompt, answer, known in zip((PROMPT, OTHER), answers, cached, strict=True):
            assert _said(engine, prompt) == (answer, known)


def test_states_count_against_the_bound(folders: dict[str, Path], tmp_path: Path) -> None:
    file, folder = tmp_path / "kv", folders["qwen35"]
    _filled(folder, file)
    with _load(folder, None) as one:
        answer = _said(one, OTHER)[0]
        size = _target(one).cache_bytes + _target(one).page_bytes  # whole pages count
    for most, found in ((size, 160), (size // 2, 0)):
        engine = _load(folder, file, kv_cache=most)
        assert _target(engine).cache_bytes <= most
        assert len(engine.prefixes.kept()) == (found > 0)
        assert _said(engine, OTHER) == (answer, found)


def _passed_over(
    data: bytes, folder: Path, file: Path, caplog: pytest.LogCaptureFixture
) -> redwood.Engine:
    """Loads with a file of these bytes, of which nothing is taken."""
    file.write_bytes(data)
    caplog.clear()
    engine = _load(folder, file)
    assert "passed over" in caplog.text and not engine.prefixes.kept()
    assert _target(engine).cache_bytes == 0
    return engine


def test_damage_anywhere_is_found_and_the_file_replaced(
    folders: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file, folder = tmp_path / "kv", folders["lfm2"]
    answer = _filled(folder, file)[0]
    whole = file.read_bytes()
    states = len(whole) - 32 - _header(whole)["num_states"] * _header(whole)["state_bytes"]
    places = [40, states - 1, states, (states + len(whole)) // 2, len(whole) - 33, len(whole) - 1]
    damaged = [whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :] for at in places]
    damaged += [whole[:size] for size in (states, states + 100, len(whole) // 2, len(whole) - 33)]
    for data in damaged:
        engine = _passed_over(data, folder, file, caplog)
    assert _said(engine, PROMPT) == (answer, 0)
    engine.close()
    with _load(folder, file) as engine:
        assert _said(engine, PROMPT) == (answer, 144)


def _header(data: bytes) -> dict[str, Any]:
    start = len(b"redwood kv 1\n")
    size = int.from_bytes(data[start : start + 8], "little")
    header: dict[str, Any] = json.loads(data[start + 8 : start + 8 + size])
    return header


def _made(data: bytes, change: Callable[[dict[str, Any]], None], tokens: Any = None) -> bytes:
    """A file with another header, or other tokens, whose digest is right."""
    start = len(b"redwood kv 1\n")
    size = int.from_bytes(data[start : start + 8], "little")
    header, rest = _header(data), data[start + 8 + size : -32]
    change(header)
    head = json.dumps(header).encode()
    if tokens is not None:
        rest = np.array(tokens, "<i4").tobytes() + rest[4 * len(tokens) :]
    made = data[:start] + len(head).to_bytes(8, "little") + head + rest
    return made + hashlib.sha256(made).digest()


def test_a_file_that_contradicts_itself_is_passed_over(
    folders: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file, folder = tmp_path / "kv", folders["qwen35"]
    _filled(folder, file)
    whole = file.read_bytes()

    def first(**own: Any) -> Callable[[dict[str, Any]], None]:
        return lambda header: header["texts"][0].update(own)

    wrong = [
        _made(whole, first(states={"16": 10_000})),
        _made(whole, first(states={"16": -1})),
        _made(whole, first(states={"0": 0})),
        _made(whole, first(states={"400": 0})),
        _made(whole, first(pages=[0])),
        _made(whole, lambda header: header.update(num_states=header["num_states"] - 1)),
        _made(whole, first(), tokens=[300, 3, 4]),
        _made(whole, first(), tokens=[-1, 3, 4]),
    ]
    for data in wrong:
        _passed_over(data, folder, file, caplog)
    file.write_bytes(_made(whole, first()))
    assert _load(folder, file).prefixes.kept()


def test_another_models_file_is_refused_and_stays(folders: dict[str, Path], tmp_path: Path) -> None:
    file = tmp_path / "kv"
    _filled(_folder(tmp_path / "other", "qwen35", intermediate_size=48), file)
    before = file.read_bytes()
    with pytest.raises(KvCacheError, match="belongs to"):
        _load(folders["qwen35"], file)
    assert file.read_bytes() == before


def test_weights_in_another_form_are_not_mixed(
    folders: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file, folder = tmp_path / "kv", folders["qwen35"]
    _filled(folder, file)
    with _load(folder, file, kv="f32") as engine:
        assert "another build" in caplog.text and not engine.prefixes.kept()
        assert _said(engine, PROMPT) == _said(_load(folder, None, kv_cache=0, kv="f32"), PROMPT)


@pytest.mark.parametrize("name", ["qwen35", "granite-hybrid"])
def test_histories_over_restarts(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    """Random requests before and behind a restart, at distances of their own."""
    known, found = TargetId("m", "w", "t", 300), 0
    plain = Plain(load_native(folders[name], None, threads=1))
    for seed in range(8):
        rng, file = random.Random(seed), tmp_path / f"kv{seed}"
        roots = [[rng.randrange(90) for _ in range(rng.randint(20, 160))] for _ in range(2)]
        for _ in range(3):
            every = rng.choice([0, 7, 16, 64])
            target = load_native(folders[name], None, threads=1, checkpoint_tokens=every)
            size = rng.choice([8, 40, 400]) * target.page_bytes
            engine = RowEngine(target, NgramDrafter(), budget=5, kv_cache=size, max_rows=4)
            kept = PrefixFile(file, known, target, engine.prefixes)
            assert target.cache_bytes <= size
            found += history(engine, plain, rng, roots, 8)
            kept.save()
            engine.prefixes.clear()
            assert target.cache_bytes == 0
    assert found > 100


def test_only_a_rows_own_tokens_and_states_are_restored(folders: dict[str, Path]) -> None:
    backend = load_native(folders["qwen35"], None, threads=1, checkpoint_tokens=16)
    engine = RowEngine(backend, kv_cache=1 << 24)
    engine.add(PROMPT, SamplingParams(max_tokens=1))
    while engine.busy:
        engine.step()
    ((_, entry),) = engine.prefixes.kept()
    pages = [backend.read_page(entry.row, i) for i in range(3)]
    states, tokens = backend.states_of(entry.row), entry.tokens
    wrong: list[tuple[list[int], dict[int, Any]]] = [
        ([], {}),
        (tokens[:-1], states),
        ([*tokens[:-1], 300], states),
        ([*tokens[:-1], -1], states),
        ([*tokens[:-1], 1 << 40], states),
        (tokens, {0: states[16]}),
        (tokens, {len(tokens) + 1: states[16]}),
    ]
    for given, found in wrong:
        row = backend.open()
        with pytest.raises(ArgumentError, match="restore"):
            backend.restore(row, pages, len(tokens), given, found)
        backend.release(row)
    with pytest.raises(ArgumentError, match="a state has"):
        backend.make_state(np.zeros(4, np.uint8))
