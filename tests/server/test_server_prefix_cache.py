"""Prompts that were read stay, for the same key and salt; usage and metrics say so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import redwood
from conftest import save_model, tiny_tokenizer
from decoder_kit import tiny_model
from redwood.engine.prefix_cache import PrefixCache
from server_kit import Live, break_release

pytest.importorskip("redwood._native", reason="installed without a compiler")

KEYS = ["first-key-1", "second-key-2"]
_LONG = "Tom went home. Anna bought pears."


def _answer(live: Live, key: str, **changes: Any) -> tuple[str, int]:
    live.http.headers["authorization"] = f"Bearer {key}"
    response = live.chat(max_tokens=6, ignore_eos=True, temperature=0.0, **changes)
    assert response.status_code == 200, response.text
    answer = response.json()
    text = answer["choices"][0]["message"]["content"]
    return text, answer["usage"]["prompt_tokens_details"]["cached_tokens"]


def test_a_prompt_is_read_once_for_each_key_and_salt(tmp_path: Path) -> None:
    model = tiny_model("llama", vocab_size=300, max_position_embeddings=512)
    folder = save_model(tmp_path, model, tiny_tokenizer())
    engine = redwood.load(folder, backend="native", threads=1, kv_cache="16MiB")
    live = Live(engine, KEYS)
    try:
        text, cached = _answer(live, KEYS[0])
        assert cached == 0
        again, cached = _answer(live, KEYS[0])
        assert again == text and cached > 0
        assert _answer(live, KEYS[1]) == (text, 0)
        assert _answer(live, KEYS[0], cache_salt="mine") == (text, 0)
        assert _answer(live, KEYS[0], cache_salt="mine") == (text, cached)
        metrics = live.http.get("/metrics").text
    finally:
        live.stop()
    assert f"redwood:prefix_cache_hit_tokens {2.0 * cached}" in metrics
    assert "redwood:prefix_cache_evictions 0.0" in metrics
    assert "redwood:prefix_cache_pages" in metrics


@pytest.mark.parametrize(
    ("path", "body", "cached"),
    [
        ("/v1/completions", {"prompt": _LONG}, "prompt_tokens_details"),
        ("/v1/responses", {"input": _LONG}, "input_tokens_details"),
        ("/v1/messages", {"messages": [{"role": "user", "content": _LONG}]}, ""),
    ],
)
def test_every_way_to_ask_has_salts(
    tmp_path: Path, path: str, body: dict[str, Any], cached: str
) -> None:
    model = tiny_model("llama", vocab_size=300, max_position_embeddings=512)
    folder = save_model(tmp_path, model, tiny_tokenizer())
    live = Live(redwood.load(folder, backend="native", threads=1, kv_cache="16MiB"))
    most = "max_output_tokens" if path == "/v1/responses" else "max_tokens"

    def found(salt: Any) -> int:
        given = {**body, most: 4, "temperature": 0.0, "cache_salt": salt}
        response = live.http.post(path, json=given)
        assert response.status_code == 200, response.text
        usage = response.json()["usage"]
        return int(usage[cached]["cached_tokens"] if cached else usage["cache_read_input_tokens"])

    try:
        assert found("mine") == 0 < found("mine")
        assert found("yours") == 0
        for wrong in ("s" * 257, 5):
            assert live.http.post(path, json={**body, "cache_salt": wrong}).status_code == 400
    finally:
        live.stop()


@pytest.mark.parametrize("replaced", [True, False], ids=["replaced", "evicted"])
def test_a_kept_row_that_cannot_be_released_costs_no_request_anything(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    replaced: bool,
) -> None:
    model = tiny_model("llama", vocab_size=300, max_position_embeddings=512)
    folder = save_model(tmp_path, model, tiny_tokenizer())
    engine = redwood.load(folder, backend="native", threads=1, kv_cache=0, drafter=None)
    page = engine.target.token_bytes * 64  # type: ignore[attr-defined]
    engine.prefixes = PrefixCache(engine.target, 99 * page if replaced else page)
    server = Live(engine)
    try:
        released = break_release(server, monkeypatch)
        first = server.text()
        assert not released
        other = [{"role": "user", "content": "Anna bought pears at the market."}]
        server.text(**({} if replaced else {"messages": other}))
        assert released and "could not be given back" in caplog.text
        assert server.text() == first
        monkeypatch.undo()
        server.alive_and_right()
    finally:
        server.stop()
