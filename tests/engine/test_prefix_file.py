"""Texts that stay over a restart: the same answers; wrong files are refused or replaced."""

from __future__ import annotations

import os
import resource
from pathlib import Path
from typing import Any

import pytest

import redwood
from conftest import save_model, tiny_tokenizer
from decoder_kit import tiny_model
from redwood.errors import ArgumentError, KvCacheError

PROMPT = [(5 * i + i * i // 7) % 250 + 2 for i in range(150)]
OTHER = [*PROMPT[:100], *PROMPT[20:90]]
HOW: dict[str, Any] = dict(max_tokens=6, temperature=0, ignore_eos=True)


def _folder(path: Path, **changes: Any) -> Path:
    model = tiny_model("llama", vocab_size=300, max_position_embeddings=512, **changes)
    return save_model(path, model, tiny_tokenizer())


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _folder(tmp_path_factory.mktemp("model"))


def _load(model: Path, file: Path | None, **more: Any) -> redwood.Engine:
    how = {"kv_cache": "16MiB", "backend": "native", "threads": 1, **more}
    return redwood.load(model, None, kv_cache_file=file, **how)


def _filled(model: Path, file: Path) -> list[list[int]]:
    """Writes a file with two texts that share a beginning; returns their answers."""
    with _load(model, file) as engine:
        made = [engine.generate(each, **HOW).token_ids for each in (PROMPT, OTHER)]
    return made


def _cached(engine: redwood.Engine, prompt: list[int]) -> tuple[list[int], int]:
    out = engine.generate(prompt, **HOW)
    return out.token_ids, out.stats.num_cached_tokens


def test_texts_are_there_after_a_restart_bit_for_bit(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "kv"
    answers = _filled(model, file)
    assert os.stat(file).st_mode & 0o777 == 0o600  # it holds what users said
    with _load(model, file) as engine:
        pages = engine.prefixes.num_pages
        assert pages == 5  # one is shared, 156 and 176 tokens would take 6
        for prompt, answer in zip((PROMPT, OTHER), answers, strict=True):
            assert _cached(engine, prompt) == (answer, len(prompt) - 1)
        plain = _load(model, None, kv_cache=0)
        further = [*OTHER, *answers[1], 9, 8, 7]
        assert _cached(engine, further)[0] == _cached(plain, further)[0]
    with _load(model, file) as engine:  # and what was saved of what was loaded
        assert _cached(engine, further)[1] == len(further) - 1


def test_a_smaller_bound_takes_the_latest(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "kv"
    _filled(model, file)
    page = 64 * _load(model, None).target.token_bytes  # type: ignore[attr-defined]
    with _load(model, file, kv_cache=3 * page) as engine:
        assert _cached(engine, OTHER)[1] == len(OTHER) - 1
        assert engine.target.cache_bytes <= 3 * page  # type: ignore[attr-defined]


def test_texts_beyond_the_capacity_are_left_out(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "kv"
    answer = _filled(model, file)[0]
    with _load(model, file, capacity=len(PROMPT) + 10) as engine:
        assert _cached(engine, PROMPT) == (answer, len(PROMPT) - 1)
        assert [len(entry.tokens) for _, entry in engine.prefixes.kept()] == [len(PROMPT) + 5]


def test_salts_stay_apart(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "kv"
    with _load(model, file) as engine:
        engine.generate(PROMPT, cache_salt="a", **HOW)
    with _load(model, file) as engine:
        assert engine.generate(PROMPT, cache_salt="b", **HOW).stats.num_cached_tokens == 0
        assert engine.generate(PROMPT, cache_salt="a", **HOW).stats.num_cached_tokens > 0


@pytest.mark.parametrize("other", ["weights", "config", "kind"])
def test_another_models_file_is_refused_and_stays(model: Path, tmp_path: Path, other: str) -> None:
    file = tmp_path / "kv"
    if other == "kind":
        file.write_text("dear diary")
    else:
        changes = {"rms_norm_eps": 1e-3} if other == "config" else {"hidden_size": 64}
        _filled(_folder(tmp_path / "other", **changes), file)
    before = file.read_bytes()
    with pytest.raises(KvCacheError, match="belongs to|holds no keys"):
        _load(model, file)
    assert file.read_bytes() == before


def test_weights_in_another_form_are_not_mixed(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "kv"
    _filled(model, file)
    with _load(model, file, weights="int8") as engine:
        assert "another build" in caplog.text and engine.prefixes.num_pages == 0
        plain = _load(model, None, kv_cache=0, weights="int8")
        assert _cached(engine, PROMPT) == _cached(plain, PROMPT)
    with _load(model, file, weights="int8") as engine:  # it was replaced
        assert _cached(engine, PROMPT)[1] == len(PROMPT) - 1


def test_damage_anywhere_is_found_and_the_file_replaced(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "kv"
    answer = _filled(model, file)[0]
    whole = file.read_bytes()
    places = [0, 12, 13, 20, 40, 200, len(whole) // 2, len(whole) - 40, len(whole) - 1]
    damaged = [whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :] for at in places]
    damaged += [whole[:size] for size in (0, 5, 13, 15, 25, 300, len(whole) // 2, len(whole) - 1)]
    damaged.append(whole + b"x")
    for data in damaged:
        file.write_bytes(data)
        caplog.clear()
        engine = _load(model, file)
        assert "passed over" in caplog.text and engine.prefixes.num_pages == 0
        assert engine.target.cache_bytes == 0  # type: ignore[attr-defined]
    assert _cached(engine, PROMPT) == (answer, 0)
    engine.close()
    with _load(model, file) as engine:
        assert _cached(engine, PROMPT) == (answer, len(PROMPT) - 1)


def test_a_full_disk_leaves_the_old_file(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "kv"
    _filled(model, file)
    before = file.read_bytes()
    engine = _load(model, file)
    engine.generate([7, *PROMPT], **HOW)
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, usual[1]))
    try:
        engine.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)
    assert "cannot write" in caplog.text
    assert file.read_bytes() == before and list(tmp_path.iterdir()) == [file]


def test_what_cannot_keep_texts_refuses_a_file(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="kv_cache_file"):
        _load(model, tmp_path / "kv", kv_cache=0)
    with pytest.raises(ArgumentError, match="kv_cache_file"):
        _load(model, tmp_path / "kv", backend="eager", threads=None)
    with pytest.raises(KvCacheError, match="does not exist"):
        _load(model, tmp_path / "none" / "kv")
    with pytest.raises(KvCacheError, match="is a folder"):
        _load(model, tmp_path)


@pytest.mark.parametrize("content", ["x", "what somebody else has written\n", None])
def test_what_is_no_file_of_keys_and_values_is_refused_and_stays(
    model: Path, tmp_path: Path, content: str | None
) -> None:
    file = tmp_path / "kv"
    os.mkfifo(file) if content is None else file.write_text(content)
    with pytest.raises(KvCacheError, match="no ordinary file" if content is None else "holds no"):
        _load(model, file)
    assert file.is_fifo() if content is None else file.read_text() == content
