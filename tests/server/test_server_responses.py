"""/v1/responses and /v1/messages: what their clients get, streamed and not."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import redwood
from conftest import save_model, tiny_llama, tiny_tokenizer
from redwood.server import fields
from redwood.server.apis import MESSAGES, RESPONSES
from redwood.server.errors import ApiError
from server_kit import Live
from tools_kit import HERMES, tool

ADD = tool("add", b={"type": "boolean"})["function"]
FLAT = {"type": "function", **ADD}
THEIRS = {"name": "add", "description": "Adds.", "input_schema": ADD["parameters"]}
ASKED: dict[str, Any] = {
    "model": "tiny",
    "input": "Tom",
    "tools": [FLAT],
    "tool_choice": "required",
    "parallel_tool_calls": False,
    "temperature": 0,
    "max_output_tokens": 150,
}
MESSAGE: dict[str, Any] = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "Tom"}],
    "tools": [THEIRS],
    "tool_choice": {"type": "any", "disable_parallel_tool_use": True},
    "temperature": 0,
    "max_tokens": 150,
}


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    tokenizer = tiny_tokenizer(279)
    tokenizer.add_tokens(["<tool_call>", "</tool_call>"])
    tokenizer.chat_template = HERMES
    folder = tmp_path_factory.mktemp("apis")
    save_model(folder, tiny_llama(vocab_size=len(tokenizer)), tokenizer)
    server = Live(redwood.load(str(folder), "ngram", backend="eager", budget=6))
    yield server
    server.stop()


def stream_of(live: Live, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    """The events of a stream; each is named as its type."""
    answer = live.http.post(path, json={**body, "stream": True})
    assert answer.status_code == 200, answer.text
    made = []
    for block in filter(None, answer.text.split("\n\n")):
        if block.startswith(":"):
            continue
        name, data = block.split("\n")
        made.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {made[-1]['type']}"
    return made


def test_a_response_is_what_openais_client_reads(live: Live) -> None:
    made = live.openai.responses.create(**ASKED)
    (call,) = made.output
    assert call.type == "function_call" and call.name == "add" and call.status == "completed"
    assert set(json.loads(call.arguments)) == {"b"} and made.status == "completed"
    assert made.usage and made.usage.total_tokens > made.usage.output_tokens > 0
    text = live.openai.responses.create(model="tiny", input="Tom", temperature=0)
    assert text.output_text == live.text(max_tokens=None) and not text.store


def test_a_streamed_response_builds_up_in_openais_order(live: Live) -> None:
    with live.openai.responses.stream(**ASKED) as stream:
        names = [event.type for event in stream]
        final = stream.get_final_response()
    assert names[:3] == ["response.created", "response.in_progress", "response.output_item.added"]
    assert names[-3:] == [
        "response.function_call_arguments.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert final.output[0].type == "function_call"
    whole = live.openai.responses.create(**ASKED).output[0]
    assert whole.type == "function_call" and whole.arguments == final.output[0].arguments
    asked = {"model": "tiny", "input": "Tom", "temperature": 0, "max_output_tokens": 12}
    made = stream_of(live, "/v1/responses", asked)
    assert [each["sequence_number"] for each in made] == list(range(len(made)))
    assert [each["type"].removeprefix("response.") for each in made if "delta" not in each] == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "incomplete",
    ]
    text = "".join(each.get("delta", "") for each in made)
    assert (
        text == live.text(max_tokens=12) == made[-1]["response"]["output"][0]["content"][0]["text"]
    )
    assert made[-1]["response"]["incomplete_details"] == {"reason": "max_output_tokens"}


@pytest.mark.parametrize("most", [30, 50])
def test_a_call_that_was_cut_is_not_called_complete_streamed_or_not(live: Live, most: int) -> None:
    asked = {**ASKED, "max_output_tokens": most}
    whole: Any = live.openai.responses.create(**asked).output[0]
    made = stream_of(live, "/v1/responses", asked)
    assert not any(each["type"].endswith("arguments.done") for each in made)
    streamed = made[-1]["response"]["output"][0]
    assert (whole.status, whole.arguments) == (streamed["status"], streamed["arguments"])
    assert whole.type == "function_call" and whole.status == "incomplete"
    with pytest.raises(json.JSONDecodeError):
        json.loads(whole.arguments)


def test_the_items_of_a_response_can_be_sent_back(live: Live) -> None:
    made = live.openai.responses.create(**ASKED).output
    result = {"type": "function_call_output", "call_id": made[0].call_id, "output": "yes"}
    history = [{"role": "user", "content": "Tom"}, *[each.model_dump() for each in made], result]
    again = live.openai.responses.create(
        model="tiny", input=history, tools=[FLAT], max_output_tokens=4, instructions="Be brief."
    )
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Tom"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [
                {
                    "id": made[0].call_id,
                    "type": "function",
                    "function": {"name": "add", "arguments": made[0].arguments},
                }
            ],
        },
        {"role": "tool", "tool_call_id": made[0].call_id, "content": "yes"},
    ]
    wrapped = [{"type": "function", "function": ADD}]
    usage = live.chat(messages=chat, tools=wrapped, max_tokens=1).json()["usage"]
    assert again.usage and again.usage.input_tokens == usage["prompt_tokens"]


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"background": True}, "background"),
        ({"truncation": "auto"}, "truncation"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input"),
        ({"tools": [{"type": "custom", "name": "x"}]}, "tools"),
        ({"temprature": 1}, "temprature"),
        ({"tool_choice": {"type": "function", "name": "sub"}}, None),
    ],
)
def test_what_responses_cannot_do_is_a_400(live: Live, changes: Any, param: str | None) -> None:
    error = live.error(live.http.post("/v1/responses", json={**ASKED, **changes}), 400)
    assert param is None or error["param"] == param


def test_tools_that_run_at_openai_are_left_out_and_it_shows(live: Live) -> None:
    tools = [FLAT, {"type": "web_search"}, {"type": "mcp", "server_label": "x"}]
    made = live.http.post("/v1/responses", json={**ASKED, "tools": tools}).json()
    assert [each["name"] for each in made["tools"]] == ["add"]


def test_a_message_has_anthropics_shape(live: Live) -> None:
    made = live.http.post("/v1/messages", json=MESSAGE).json()
    (block,) = made["content"]
    assert block["type"] == "tool_use" and set(block["input"]) == {"b"}
    assert made["stop_reason"] == "tool_use" and made["role"] == "assistant"
    events = stream_of(live, "/v1/messages", MESSAGE)
    order = [each["type"] for each in events]
    assert order[:3] == ["message_start", "ping", "content_block_start"]
    assert order[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    said = "".join(each["delta"].get("partial_json", "") for each in events[3:-3])
    assert json.loads(said) == block["input"]
    assert events[-2]["delta"] == {"stop_reason": "tool_use", "stop_sequence": None}
    usage = events[-2]["usage"]
    assert usage["output_tokens"] == made["usage"]["output_tokens"]


def test_messages_carry_results_and_count_tokens(live: Live) -> None:
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "Tom", "cache_control": {}}]},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "Hm.", "signature": ""},
                {"type": "text", "text": "Adding."},
                {"type": "tool_use", "id": "t1", "name": "add", "input": {"b": True}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "t1", "content": "2", "is_error": False}
            ],
        },
    ]
    body = {"model": "tiny", "messages": messages, "system": "Be.", "tools": [THEIRS]}
    counted = live.http.post("/v1/messages/count_tokens", json=body).json()["input_tokens"]
    made = live.http.post("/v1/messages", json={**body, "max_tokens": 3}).json()
    assert made["usage"]["input_tokens"] == counted > 30
    assert made["stop_reason"] == "max_tokens" and made["content"][0]["type"] == "text"


def test_a_stop_sequence_is_named(live: Live) -> None:
    asked = {"model": "tiny", "messages": MESSAGE["messages"], "temperature": 0, "max_tokens": 12}
    text = live.http.post("/v1/messages", json=asked).json()["content"][0]["text"]
    stop = text[4:6]
    made = live.http.post("/v1/messages", json={**asked, "stop_sequences": ["zz", stop]}).json()
    assert made["stop_reason"] == "stop_sequence" and made["stop_sequence"] == stop


@pytest.mark.parametrize(
    ("body", "status", "kind"),
    [
        ({**MESSAGE, "max_tokens": 0}, 400, "invalid_request_error"),
        ({**MESSAGE, "model": "huge"}, 404, "not_found_error"),
        ({**MESSAGE, "messages": [{"role": "user", "content": [{"type": "image"}]}]}, 400, ""),
        ({**MESSAGE, "container": "x"}, 400, "invalid_request_error"),
        ({**MESSAGE, "tool_choice": {"type": "tool", "name": "sub"}}, 400, ""),
        ({**MESSAGE, "unheard_of": 1}, 400, ""),
    ],
)
def test_errors_of_messages_have_anthropics_shape(
    live: Live, body: Any, status: int, kind: str
) -> None:
    answer = live.http.post("/v1/messages", json=body)
    assert answer.status_code == status
    told = answer.json()
    assert told["type"] == "error" and told["error"]["type"].startswith(kind)
    assert told["request_id"] == answer.headers["x-request-id"]


def test_anthropics_header_carries_the_key(live: Live, tiny_model_folder: Path) -> None:
    key = "sk-ant-secret"
    server = Live(redwood.load(str(tiny_model_folder), backend="eager"), keys=[key])
    body = {"messages": MESSAGE["messages"], "max_tokens": 2}
    try:
        for headers, status in (({"x-api-key": key}, 200), ({"x-api-key": "wrong-key"}, 401)):
            del server.http.headers["authorization"]
            answer = server.http.post("/v1/messages", json=body, headers=headers)
            server.http.headers["authorization"] = f"Bearer {key}"
            assert answer.status_code == status
            assert status == 200 or answer.json()["error"]["type"] == "authentication_error"
    finally:
        server.stop()


def test_embeddings_are_refused_clearly(live: Live) -> None:
    error = live.error(live.http.post("/v1/embeddings", json={"input": "x"}), 400)
    assert "embedding" in error["message"] and error["code"] == "unsupported_endpoint"


def test_every_api_asks_for_the_same_chat() -> None:
    asked, _ = RESPONSES.read(json.dumps(ASKED).encode())
    theirs, _ = MESSAGES.read(json.dumps(MESSAGE).encode())
    named = {"type": "function", "function": ADD}
    chat = fields.read(
        json.dumps(
            {
                "model": "tiny",
                "messages": [{"role": "user", "content": "Tom"}],
                "tools": [named],
                "tool_choice": "required",
                "parallel_tool_calls": False,
                "temperature": 0,
                "max_completion_tokens": 150,
            }
        ).encode(),
        type(asked),
    )
    assert asked == chat
    assert theirs.model_dump(exclude={"tools"}) == chat.model_dump(exclude={"tools"})
    with pytest.raises(ApiError):
        MESSAGES.read(b"[]")


def test_what_openais_client_adds_to_items_is_no_error(live: Live) -> None:
    with live.openai.responses.stream(**ASKED) as stream:
        made = stream.get_final_response().output
    sent = [each.model_dump(exclude_none=True) for each in made]
    assert "parsed_arguments" in sent[0] or sent[0]["type"] == "function_call"
    result = {"type": "function_call_output", "call_id": made[0].call_id, "output": "yes"}
    again = {**ASKED, "tool_choice": "none", "max_output_tokens": 3, "input": [*sent, result]}
    assert live.http.post("/v1/responses", json=again).status_code == 200
