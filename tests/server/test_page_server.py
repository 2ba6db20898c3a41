"""The web page before the real server, with the tiny model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import redwood
from conftest import save_model, tiny_llama, tiny_tokenizer
from page_kit import Page
from pool_kit import LivePool
from server_kit import Live
from tools_kit import HERMES, THINKING, tool


def _open(browser: Any, server: Live | LivePool) -> Page:
    return Page(browser, f"{server.url}/")


def test_the_real_server_answers_the_page(browser: Any, live: Callable[..., Live]) -> None:
    page = _open(browser, live())
    page.set("#max-tokens", "24")
    page.ask("Tom went to the market. Tom went")
    assert page.text(".answer .text")
    tokens, steps = (int(part.split()[0]) for part in page.text(".foot").split(" · ")[:2])
    assert 0 < steps <= tokens <= 24
    assert len(page.all("#list [role=option]")) == steps
    page.button("Compare with plain decoding")
    page.until(lambda: "texts are equal" in page.text(".verdict"))
    assert page.complaints() == []
    browser.get("about:blank")


def test_the_real_server_has_several_models(browser: Any, pool: Callable[..., LivePool]) -> None:
    server = pool()
    page = _open(browser, server)
    page.set("#max-tokens", "8")
    page.ask("Tom went")
    page.set("#model", "b")
    page.ask("Tom went")  # b is loaded for it
    assert [e.text for e in page.all(".answer > h3")] == ["a", "b"]
    assert all(e.text for e in page.all(".answer .text"))
    assert server.states() == {"a": "loaded", "b": "loaded"}
    assert page.complaints() == []
    browser.get("about:blank")


def test_the_real_server_asks_for_its_key(browser: Any, live: Callable[..., Live]) -> None:
    page = _open(browser, live(keys=["right-key"]))
    assert "API key" in page.text("#server")
    page.set("#key", "right-key")
    page.until(lambda: page.all("#server.ready"))
    page.set("#max-tokens", "4")
    page.ask()
    assert page.all(".answer .error") == [] and page.all("#list [role=option]")
    assert page.complaints() == []
    browser.get("about:blank")


def test_the_real_server_can_keep_its_trees(browser: Any, live: Callable[..., Live]) -> None:
    page = _open(browser, live(trace=False))
    page.set("#max-tokens", "4")
    page.ask()
    assert page.text(".answer .text") and "does not show its trees" in page.text("#tree")
    browser.get("about:blank")


def test_a_stream_of_the_real_server_is_a_recording(
    browser: Any, live: Callable[..., Live], tmp_path: Any
) -> None:
    server = live()
    body = {
        "messages": [{"role": "user", "content": "Tom went"}],
        "max_tokens": 8,
        "temperature": 0,
        "stream": True,
        "redwood": {"trace": True},
    }
    stream = server.http.post("/v1/chat/completions", json=body).text
    steps = sum('"redwood"' in line for line in stream.splitlines())
    assert steps and json.loads(stream.split("\n\n")[0].removeprefix("data: "))
    file = tmp_path / "run.jsonl"
    file.write_text(stream, "utf-8")
    page = _open(browser, server)
    page.one("#file").send_keys(str(file))
    page.until(lambda: len(page.all("#list [role=option]")) == steps)
    assert "left out" not in page.text("#file-note")
    browser.get("about:blank")


def test_the_real_server_reasons_and_calls_tools_for_the_page(browser: Any, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(279)
    tokenizer.add_tokens(["<tool_call>", "</tool_call>", "<think>", "</think>"])
    tokenizer.chat_template = THINKING
    folder = save_model(tmp_path, tiny_llama(vocab_size=len(tokenizer)), tokenizer)
    server = Live(redwood.load(str(folder), "ngram", backend="eager", budget=6))
    try:
        page = _open(browser, server)
        page.set("#max-tokens", "8")
        page.ask("Tom")
        assert page.text(".reasoning .plain") and not page.one(".answer .text").is_displayed()
        page.set("#reasoning", "off")
        page.ask("Tom")
        assert len(page.all(".reasoning")) == 1 and page.text(".answer:last-child .text")
        server.engine.tokenizer.chat_template = HERMES  # else it might reason without end
        page.click("#clear")
        page.set("#reasoning", "")
        page.set("#max-tokens", "100")
        page.set("#tools", json.dumps([tool("switch", on={"type": "boolean"})]))
        page.set("#tool-choice", "required")
        page.ask("Tom")
        assert page.text(".call summary") == "Tool call switch"
        assert json.loads(page.text(".call pre"))["on"] in (True, False)
        assert " read, " in page.all(".foot span")[-1].text
        before = len(page.all(".answer"))
        page.one(".results textarea").send_keys("done")
        page.set("#max-tokens", "8")
        page.button("Send result")
        page.until(lambda: len(page.all(".answer")) > before)
        page.ended()
        assert page.all(".answer .error") == [] and page.text(".answer:last-child .text")
        assert page.complaints() == []
    finally:
        browser.get("about:blank")
        server.stop()
