"""`redwood chat`: turns, commands, Ctrl-C, and a context that fills up."""

from __future__ import annotations

import builtins
import json
from pathlib import Path
from typing import Any

import pytest

import redwood
from cli_kit import Ran, chat_prompt, press_ctrl_c
from redwood import Engine
from redwood.cli import chat as chat_command


@pytest.fixture
def target(tiny_model_folder: Path) -> str:
    return str(tiny_model_folder)


@pytest.fixture(scope="module")
def engine(tiny_model_folder: Path) -> Engine:
    return redwood.load(str(tiny_model_folder))


def test_chat_keeps_the_conversation(target: str, engine: Engine) -> None:
    ran = Ran("chat", "-t", target, "--max-tokens", "8", "--json", stdin="Tom\n\nAnna\n")
    assert ran.code == 0, ran.stderr
    first, second = (json.loads(line) for line in ran.stdout.splitlines())
    history = chat_prompt("Tom")
    assert first["token_ids"] == engine.generate(history, max_tokens=8).token_ids
    history += [{"role": "assistant", "content": first["text"]}, *chat_prompt("Anna")]
    assert second["token_ids"] == engine.generate(history, max_tokens=8).token_ids
    assert (second["message"], second["dropped_turns"]) == ("Anna", 0)


def test_chat_prints_text_and_knows_its_commands(target: str, engine: Engine) -> None:
    lines = "/stats\nTom\n/help\n/reset\nTom\n/stats\n/sing\n/exit\nnever\n"
    ran = Ran("chat", "-t", target, "--max-tokens", "8", "--system", "x", stdin=lines)
    messages = [{"role": "system", "content": "x"}, *chat_prompt("Tom")]
    text = engine.generate(messages, max_tokens=8).text.removesuffix("\n") + "\n"
    assert ran.code == 0 and ran.stdout == text * 2
    for said in ("no answer so far", "/exit", "anew", "last answer", "unknown command /sing"):
        assert said in ran.stderr


def test_chat_drops_the_oldest_turns_with_a_notice(target: str) -> None:
    lines = [f"{i} Tom went to the market, and on." for i in range(8)]
    ran = Ran("chat", "-t", target, "--max-tokens", "30", "--json", stdin="\n".join(lines))
    assert ran.code == 0, ran.stderr
    answers = [json.loads(line) for line in ran.stdout.splitlines()]
    assert len(answers) == 8
    assert answers[0]["dropped_turns"] == 0 and sum(a["dropped_turns"] for a in answers) > 0
    assert "dropped: the context holds 256 tokens" in ran.stderr
    for answer in answers:  # room for the whole answer was kept
        assert answer["stats"]["num_prompt_tokens"] <= 256 - 30


def test_a_message_too_long_for_the_context_is_an_error(target: str) -> None:
    assert "the context holds 256" in Ran("chat", "-t", target, stdin="Tom " * 400).error()


def test_ctrl_c_in_a_piped_chat_ends_it(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    press_ctrl_c(monkeypatch, after=1)
    ran = Ran("chat", "-t", target, stdin="Tom\nAnna\n")
    assert (ran.code, ran.stderr) == (130, "interrupted\n")


class Person:
    """Someone at a terminal: types lines, or presses Ctrl-C; at the end, Ctrl-D."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *typed: str | None) -> None:
        self._typed = iter(typed)
        monkeypatch.setattr(builtins, "input", self._input)

    def _input(self, prompt: str) -> str:
        assert prompt == "> "
        typed = next(self._typed, ...)
        if typed is ...:
            raise EOFError
        if typed is None:
            raise KeyboardInterrupt
        return str(typed)


def interactive(engine: Engine, **settings: Any) -> chat_command.Conversation:
    conversation = chat_command.Conversation(engine, settings, settings["max_tokens"], None)
    chat_command.Chat(conversation, interactive=True, shaded=False, as_json=False).run()
    return conversation


def test_ctrl_c_at_a_terminal_stops_the_answer_only(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Person(monkeypatch, None, "Tom", "Anna")
    press_ctrl_c(monkeypatch, after=4)
    conversation = interactive(engine, max_tokens=20, ignore_eos=True)
    roles = [message["role"] for message in conversation.messages]
    assert roles == ["user", "assistant", "user", "assistant"]
    first, second = (m["content"] for m in conversation.messages if m["role"] == "assistant")
    assert 0 < len(engine.encode(first)) < len(engine.encode(second))
    shown = capsys.readouterr()
    assert "(stopped)" in shown.err and "Ctrl-D or /exit ends" in shown.err
    assert shown.out == "\n" + "".join(t + "\n" * (t[-1:] != "\n") for t in (first, second)) + "\n"


def test_an_answer_stopped_before_its_first_word_leaves_no_trace(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    Person(monkeypatch, "Tom")
    press_ctrl_c(monkeypatch, after=0)
    assert interactive(engine, max_tokens=20).messages == []


def test_an_error_at_a_terminal_does_not_end_the_chat(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Person(monkeypatch, "Tom", "Anna " * 300, "/exit")
    conversation = interactive(engine, max_tokens=4)
    assert [m["content"] for m in conversation.messages][:1] == ["Tom"]
    assert len(conversation.messages) == 2
    assert "error: the prompt has" in capsys.readouterr().err
