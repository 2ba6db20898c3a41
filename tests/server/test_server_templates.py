"""Over HTTP: what chat templates of any kind do to a request, and models of another width than
their tokenizers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import redwood
from cli_kit import Ran
from conftest import save_model, tiny_llama, tiny_tokenizer
from server_kit import Live

PARTS = "{% for m in messages %}{% for c in m.content %}{{ c.text }}{% endfor %}{% endfor %}"
TEXT = "Tom went to the market."
WHOLE = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}
WHOLE["additionalProperties"] = False
FORMAT = {"type": "json_schema", "json_schema": {"name": "x", "schema": WHOLE}}


@pytest.fixture(scope="module")
def live(tiny_model_folder: Path) -> Iterator[Live]:
    server = Live(redwood.load(str(tiny_model_folder), "ngram", backend="eager", budget=6))
    yield server
    server.stop()


def asked(live: Live, template: Any, content: Any = TEXT, role: str = "user") -> Any:
    live.engine.tokenizer.chat_template = template
    messages = [{"role": role, "content": content}, {"role": "user", "content": "So?"}]
    return live.chat(messages=messages, max_tokens=2)


def test_text_reaches_a_template_that_takes_parts(live: Live) -> None:
    expected = len(tiny_tokenizer()(f"{TEXT}So?")["input_ids"])
    for content in (TEXT, [{"type": "text", "text": TEXT}]):
        answer = asked(live, PARTS, content).json()
        assert answer["usage"]["prompt_tokens"] == expected


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}", "leaves out"),
        ("{{ 'x' + messages | length }}", "TypeError"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ raise_exception('no system role') }}", "no system role"),
        ({"rag": "R", "tool_use": "T"}, "rag, tool_use and none called default"),
        ("{{ 'x' * 3000000 }}{{ messages | tojson }}", "without measure"),
    ],
)
def test_what_a_template_cannot_do_is_a_400_with_the_reason(
    live: Live, template: Any, reason: str
) -> None:
    response = asked(live, template, role="system")
    error = response.json()["error"]
    assert response.status_code == 400 and reason in error["message"]
    assert error["param"] == "messages" and "bug" not in error["message"]


@pytest.mark.parametrize("template", ["{{ 1 / 0 }}", {"rag": "R"}, "nothing"])
def test_the_command_line_says_it_in_one_line(tmp_path: Path, template: Any) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    folder = save_model(tmp_path, tiny_llama(), tokenizer)
    said = Ran("generate", "--target", str(folder), "--prompt", TEXT, "--max-tokens", "2").error()
    assert "template" in said and "a bug in Redwood" not in said


@pytest.mark.parametrize("width", [280, 400])
def test_models_of_another_width_than_their_tokenizer_serve(tmp_path: Path, width: int) -> None:
    tokenizer = tiny_tokenizer(279)
    if width == 280:
        tokenizer.add_special_tokens({"additional_special_tokens": ["<image>", "<audio>"]})
        assert len(tokenizer) > width
    folder = save_model(tmp_path, tiny_llama(vocab_size=width), tokenizer)
    server = Live(redwood.load(str(folder), "ngram", backend="eager", budget=6))
    try:
        bias = {str(width - 1): 100}  # a token without text, which no grammar allows
        made = server.text(response_format=FORMAT, max_tokens=60, logit_bias=bias, seed=1)
        assert isinstance(json.loads(made)["a"], bool)
        silent = server.chat(logit_bias=bias, max_tokens=3, logprobs=True, top_logprobs=2)
        assert silent.status_code == 200 and silent.json()["usage"]["completion_tokens"] == 3
        assert silent.json()["choices"][0]["message"]["content"] == ""
        guess = {"type": "content", "content": "a <image> b <audio> c"}
        assert server.chat(prediction=guess).status_code == 200
        if width == 280:
            said = server.error(server.chat(messages=[{"role": "user", "content": "<audio>"}]), 400)
            assert "holds <audio>, a token that this model does not have" in said["message"]
    finally:
        server.stop()
