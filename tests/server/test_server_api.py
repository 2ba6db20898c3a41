"""Answers over HTTP, through OpenAI's own client: the same text as the engine gives."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from openai import APIStatusError, BadRequestError, NotFoundError

import redwood
from redwood import Engine
from server_kit import CHAT, Live, events

TOM = CHAT["messages"]
SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"temperature": 0.9, "seed": 5, "top_p": 0.9, "top_k": 50, "min_p": 0.01},
    "repetition": {"repetition_penalty": 1.1},
    "presence": {"presence_penalty": 1.5, "frequency_penalty": 0.5},
    "bias": {"logit_bias": {"40": 8, "41": -100}},
    "stop": {"stop": ["a", "e", "\n"]},
    "no end": {"ignore_eos": True},
    "one": {"max_tokens": 1},
    "two": {"max_tokens": 2},
    "five": {"max_tokens": 5},
    "logprobs": {"logprobs": True, "top_logprobs": 3},
    "predicted": {"prediction": {"type": "content", "content": "Tom went to the market"}},
    "plain": {"redwood": {"speculate": False}},
}
_ONLY_HTTP = ("logprobs", "top_logprobs", "prediction", "redwood")


@pytest.fixture(scope="module")
def reference(tiny_model_folder: Path) -> Engine:
    return redwood.load(str(tiny_model_folder), backend="eager")


@pytest.fixture(scope="module", params=["none", "ngram", "model"])
def any_server(
    request: pytest.FixtureRequest, tiny_model_folder: Path, tiny_draft_folder: Path
) -> Iterator[Live]:
    """A server with each kind of drafter."""
    drafter = str(tiny_draft_folder) if request.param == "model" else request.param
    engine = redwood.load(str(tiny_model_folder), drafter, backend="eager", budget=6, max_rows=4)
    live = Live(engine)
    yield live
    live.stop()


@pytest.fixture(scope="module")
def server(tiny_model_folder: Path) -> Iterator[Live]:
    live = Live(redwood.load(str(tiny_model_folder), "ngram", backend="eager", budget=6))
    yield live
    live.stop()


def expected(reference: Engine, changes: dict[str, Any]) -> str:
    params = {k: v for k, v in changes.items() if k not in _ONLY_HTTP}
    if "logit_bias" in params:
        params["logit_bias"] = {int(k): v for k, v in params["logit_bias"].items()}
    return reference.generate(TOM, **{"temperature": 0, "max_tokens": 12, **params}).text


@pytest.mark.parametrize("name", SETTINGS)
def test_every_option_gives_the_engines_text_with_every_drafter(
    any_server: Live, reference: Engine, name: str
) -> None:
    changes = SETTINGS[name]
    text = any_server.text(**changes)
    assert text == expected(reference, changes)
    streamed = events(any_server.chat(**changes, stream=True).text)
    pieces = [c["choices"][0]["delta"].get("content", "") for c in streamed[:-1]]
    assert "".join(pieces) == text and streamed[-1] == "[DONE]"


def test_company_changes_no_text(any_server: Live, reference: Engine) -> None:
    hostile = [{"logit_bias": {"99999": 5}}, {"stop": ["x"] * 9}, {"top_p": 7}]
    wanted = [*SETTINGS.values()] * 2
    with ThreadPoolExecutor(12) as pool:
        bad = [pool.submit(any_server.chat, **changes) for changes in hostile * 3]
        texts = list(pool.map(lambda changes: any_server.text(**changes), wanted))
        assert all(each.result().status_code == 400 for each in bad)
    assert texts == [expected(reference, changes) for changes in wanted]
    any_server.alive_and_right()


def test_plain_answer_has_openais_fields(server: Live) -> None:
    made = server.openai.chat.completions.create(model="tiny", **CHAT)
    assert made.id.startswith("chatcmpl-") and made.object == "chat.completion"
    assert made.model == "tiny" and made.created > 1_700_000_000 and made.system_fingerprint
    choice = made.choices[0]
    assert choice.message.role == "assistant" and choice.finish_reason == "length"
    assert made.usage is not None and made.usage.completion_tokens == 12
    assert made.usage.total_tokens == made.usage.prompt_tokens + 12
    assert made._request_id and made._request_id.startswith("req-")


def test_usage_says_what_speculation_did(server: Live) -> None:
    usage = server.chat(prediction={"type": "content", "content": server.text()}).json()["usage"]
    ours, details = usage["redwood"], usage["completion_tokens_details"]
    assert ours["num_accepted_tokens"] <= ours["num_draft_tokens"]
    assert ours["mean_acceptance_length"] == 12 / ours["target_passes"] > 1
    assert details["accepted_prediction_tokens"] > 0
    assert details["rejected_prediction_tokens"] >= 0
    assert set(ours["seconds"]) == {"prefill", "draft", "target", "verify", "other"}
    plain = server.chat(redwood={"speculate": False}).json()["usage"]["redwood"]
    assert (plain["target_passes"], plain["num_draft_tokens"]) == (12, 0)


def test_stream_has_a_role_first_and_usage_last(server: Live) -> None:
    stream = server.openai.chat.completions.create(
        model="tiny", **CHAT, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert len({chunk.id for chunk in chunks}) == 1
    assert [c.choices[0].finish_reason for c in chunks[:-1]].count("length") == 1
    assert chunks[-2].choices[0].finish_reason == "length"
    assert not chunks[-1].choices and chunks[-1].usage and chunks[-1].usage.completion_tokens == 12
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_stream_headers_and_framing(server: Live) -> None:
    response = server.chat(stream=True)
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["cache-control"] == "no-cache"
    assert response.text.endswith("data: [DONE]\n\n")


def test_padding_hides_lengths(server: Live) -> None:
    response = server.chat(stream=True, stream_options={"include_obfuscation": True})
    lines = [line for line in response.text.split("\n\n") if line.startswith("data: {")]
    assert {len(line.removeprefix("data: ")) % 256 for line in lines} == {0}


def test_n_answers_are_the_seeds_one_after_another(server: Live, reference: Engine) -> None:
    sampled = {"temperature": 1.0, "seed": 3}
    made = server.openai.chat.completions.create(model="tiny", **{**CHAT, **sampled}, n=3)
    texts = [choice.message.content for choice in made.choices]
    assert [choice.index for choice in made.choices] == [0, 1, 2]
    assert texts == [expected(reference, {**sampled, "seed": 3 + i}) for i in range(3)]
    assert made.usage and made.usage.completion_tokens == 36
    streamed = events(server.chat(**sampled, n=3, stream=True).text)
    joined = ["", "", ""]
    for chunk in streamed[:-1]:
        choice = chunk["choices"][0]
        joined[choice["index"]] += choice["delta"].get("content", "")
    assert joined == texts


def test_logprobs_belong_to_the_tokens(server: Live) -> None:
    made = server.openai.chat.completions.create(
        model="tiny", **CHAT, logprobs=True, top_logprobs=2
    )
    found = made.choices[0].logprobs
    assert found is not None and found.content is not None and len(found.content) == 12
    for token in found.content:
        assert token.logprob == token.top_logprobs[0].logprob <= 0
        assert token.top_logprobs[0].logprob >= token.top_logprobs[1].logprob
    said = b"".join(bytes(token.bytes or []) for token in found.content)
    assert said.decode(errors="replace") == made.choices[0].message.content
    streamed = events(server.chat(logprobs=True, stream=True).text)
    counted = [
        len((c["choices"][0]["logprobs"] or {"content": []})["content"]) for c in streamed[:-1]
    ]
    assert sum(counted) == 12


def test_completions_continue_texts_and_token_ids(server: Live, reference: Engine) -> None:
    make = server.openai.completions.create
    params: dict[str, Any] = {"model": "tiny", "temperature": 0, "max_tokens": 6}
    texts = [reference.generate(p, temperature=0, max_tokens=6).text for p in ("Tom", "Anna")]
    made = make(prompt=["Tom", "Anna"], logprobs=2, **params)
    assert made.object == "text_completion" and made.id.startswith("cmpl-")
    assert [choice.text for choice in made.choices] == texts
    found = made.choices[0].logprobs
    assert found is not None and found.tokens is not None and found.text_offset is not None
    assert len(found.tokens) == 6 and found.text_offset[0] == 0
    ids = reference.encode("Tom")
    assert make(prompt=ids, **params).choices[0].text == texts[0]
    assert make(prompt=[ids, ids], **params, n=2).choices[3].text == texts[0]
    streamed = list(make(prompt="Tom", stream=True, **params))
    assert "".join(chunk.choices[0].text for chunk in streamed) == texts[0]


def test_more_tokens_than_the_context_holds_are_clamped_without_allocating(server: Live) -> None:
    made = server.chat(max_tokens=10**9, ignore_eos=True).json()
    assert made["usage"]["total_tokens"] == server.engine.target.capacity
    assert made["choices"][0]["finish_reason"] == "length"


def test_prompt_longer_than_the_context_is_refused_with_both_numbers(server: Live) -> None:
    error = server.error(server.chat(messages=[{"role": "user", "content": "Tom " * 400}]), 400)
    assert error["code"] == "context_length_exceeded" and "256" in error["message"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [300]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": ["x"] * 17}, "prompt"),
        ({"prompt": "x", "n": 17}, "n"),
        ({"prompt": "x", "logit_bias": {"300": 1}}, "logit_bias"),
        ({"prompt": "x", "logit_bias": {"x": 1}}, "logit_bias"),
        ({"prompt": "x", "logprobs": 6}, "logprobs"),
    ],
)
def test_what_the_engine_would_refuse_is_400_before_it_gets_there(
    server: Live, body: dict[str, Any], param: str
) -> None:
    calls = server.stage.calls
    error = server.error(server.http.post("/v1/completions", json=body), 400)
    assert error["param"] == param and server.stage.calls == calls


def test_odd_texts_are_taken_as_they_are(server: Live) -> None:
    for text in ("\x00", "\ufeff", "\u202eabc", "<|im_end|>", "a" * 200, "<s>"):
        assert server.chat(messages=[{"role": "user", "content": text}]).status_code == 200
    server.alive_and_right()


def test_models_are_listed_and_described(server: Live) -> None:
    assert [model.id for model in server.openai.models.list()] == ["tiny"]
    assert server.openai.models.retrieve("tiny").owned_by == "redwood"
    with pytest.raises(NotFoundError):
        server.openai.models.retrieve("huge")


@pytest.mark.parametrize(
    "name",
    ["../../etc/passwd", "/etc/passwd", "..\\", "%2e%2e", "file:///etc/passwd", "hf://evil/x"]
    + ["\x00", "x" * 10_000, "\u202e", ""],
)
def test_a_model_name_is_compared_and_never_opened(
    server: Live, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Any] = []
    monkeypatch.setattr("builtins.open", lambda *a, **k: opened.append(a))
    response = server.chat(model=name)
    monkeypatch.undo()
    assert server.error(response, 404)["code"] == "model_not_found" and opened == []


def test_errors_have_openais_shape_everywhere(server: Live) -> None:
    post = server.http.post
    server.error(server.http.get("/v1/nothing"), 404)
    server.error(server.http.get("/v1/chat/completions"), 405)
    server.error(server.http.delete("/health"), 405)
    server.error(post("/v1/chat/completions", content=b"{}"), 415)
    server.error(post("/v1/chat/completions", data={"messages": "x"}), 415)
    server.error(post("/v1/chat/completions", json={}), 400)
    with pytest.raises(BadRequestError) as error:
        server.openai.chat.completions.create(model="tiny", messages=TOM, temperature=9)
    assert error.value.body["param"] == "temperature"  # type: ignore[index]
    with pytest.raises(APIStatusError):
        server.openai.chat.completions.create(model="huge", messages=TOM)


def test_a_request_names_no_model_and_gets_the_only_one(live: Callable[..., Live]) -> None:
    server = live(model_names=("org/first", "second"))
    assert server.chat().json()["model"] == "org/first"
    assert server.chat(model="second").json()["model"] == "second"
    assert server.http.get("/v1/models/org/first").json()["id"] == "org/first"


def test_output_limit_of_the_operator_holds(live: Callable[..., Live]) -> None:
    server = live(max_output_tokens=3)
    assert server.chat().json()["usage"]["completion_tokens"] == 3


def test_every_chunk_of_a_step_can_carry_its_tree(server: Live) -> None:
    streamed = events(server.chat(stream=True, redwood={"trace": True}).text)[:-1]
    steps = [chunk["redwood"] for chunk in streamed if "redwood" in chunk]
    assert [step["step"] for step in steps] == list(range(1, len(steps) + 1))
    tokens = []
    for step in steps:
        nodes = step["nodes"]
        assert nodes[0]["parent"] == -1 and step["accepted"][0] == 0
        assert nodes[0]["sources"] == []
        assert all(set(node["sources"]) & {"text", "table", "model"} for node in nodes[1:])
        for parent, child in zip(step["accepted"], step["accepted"][1:], strict=False):
            assert nodes[child]["parent"] == parent
            tokens.append(nodes[child]["token"])
        if step["bonus"] is not None:
            tokens.append(step["bonus"]["token"])
        assert step["generated"] == len(tokens)
        assert {"draft", "target", "verify", "other"} <= set(step["seconds"])
    assert server.engine.tokenizer.decode(tokens, skip_special_tokens=True) == server.text()


def test_traces_can_be_forbidden(live: Callable[..., Live]) -> None:
    server = live(trace=False)
    error = server.error(server.chat(stream=True, redwood={"trace": True}), 400)
    assert error["param"] == "redwood"
