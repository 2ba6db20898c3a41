r"""Tool calls, responses and messages with the clients that are installed; `--url` of a server.

pip install openai anthropic litellm langchain-openai
python benchmarks/serving/clients/tool_calls.py --url http://127.0.0.1:8000 \
    --model qwen2.5-coder-0.5b-instruct
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
from collections.abc import Callable
from typing import Any

SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
    "additionalProperties": False,
}
FUNCTION = {"name": "get_weather", "description": "The weather now.", "parameters": SCHEMA}
TOOL = {"type": "function", "function": FUNCTION}
ASK = "What is the weather in Oslo?"


def openai_chat(url: str, model: str) -> str:
    from openai import OpenAI

    client = OpenAI(base_url=f"{url}/v1", api_key="none")
    asked: Any = {
        "model": model,
        "messages": [{"role": "user", "content": ASK}],
        "tools": [TOOL],
        "tool_choice": "required",
        "parallel_tool_calls": False,
        "temperature": 0,
        "max_tokens": 100,
    }
    made = client.chat.completions.create(**asked).choices[0].message
    call = made.tool_calls[0].function
    assert set(json.loads(call.arguments)) == {"city"}
    with client.chat.completions.stream(**asked) as stream:
        final = stream.get_final_completion().choices[0].message
    assert final.tool_calls[0].function.arguments == call.arguments
    asked["messages"] += [
        made.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": made.tool_calls[0].id, "content": "Rain, 4 degrees."},
    ]
    answer = client.chat.completions.create(**{**asked, "tool_choice": "none"})
    return str(answer.choices[0].message.content)[:50]


def openai_responses(url: str, model: str) -> str:
    from openai import OpenAI

    client = OpenAI(base_url=f"{url}/v1", api_key="none")
    asked: Any = {
        "model": model,
        "input": [{"role": "user", "content": ASK}],
        "tools": [{"type": "function", **FUNCTION, "strict": True}],
        "tool_choice": "required",
        "parallel_tool_calls": False,
        "temperature": 0,
        "max_output_tokens": 100,
        "store": False,
    }
    with client.responses.stream(**asked) as stream:
        names = [event.type for event in stream]
        made = stream.get_final_response()
    assert names[0] == "response.created" and names[-1] == "response.completed"
    call = made.output[0]
    assert set(json.loads(call.arguments)) == {"city"}
    asked["input"] += [
        *[each.model_dump(exclude_none=True) for each in made.output],
        {"type": "function_call_output", "call_id": call.call_id, "output": "Rain."},
    ]
    return str(client.responses.create(**{**asked, "tool_choice": "none"}).output_text)[:50]


def anthropic(url: str, model: str) -> str:
    from anthropic import Anthropic

    client = Anthropic(base_url=url, api_key="none-needed")
    asked: Any = {
        "model": model,
        "max_tokens": 100,
        "temperature": 0,
        "system": "Be brief.",
        "messages": [{"role": "user", "content": ASK}],
        "tools": [{"name": "get_weather", "description": "Weather.", "input_schema": SCHEMA}],
        "tool_choice": {"type": "any", "disable_parallel_tool_use": True},
    }
    extra = {key: asked.pop(key) for key in ("temperature",)}
    counted = client.messages.count_tokens(
        **{k: v for k, v in asked.items() if k != "max_tokens"}
    ).input_tokens
    made = client.messages.create(**asked, extra_body=extra)
    block = made.content[0]
    assert made.stop_reason == "tool_use" and set(block.input) == {"city"}
    assert counted == made.usage.input_tokens + (made.usage.cache_read_input_tokens or 0)
    with client.messages.stream(**asked, extra_body=extra) as stream:
        final = stream.get_final_message()
    assert final.content[0].input == block.input
    result = {"type": "tool_result", "tool_use_id": block.id, "content": "Rain."}
    asked["messages"] += [
        {"role": "assistant", "content": [each.model_dump() for each in made.content]},
        {"role": "user", "content": [result]},
    ]
    answer = client.messages.create(**{**asked, "tool_choice": {"type": "none"}}, extra_body=extra)
    return str(answer.content[0].text)[:50]


def litellm(url: str, model: str) -> str:
    import litellm as client

    made = client.completion(
        model=f"openai/{model}",
        api_base=f"{url}/v1",
        api_key="none",
        messages=[{"role": "user", "content": ASK}],
        tools=[TOOL],
        tool_choice="required",
        temperature=0,
        max_tokens=100,
    )
    call = made.choices[0].message.tool_calls[0].function
    return f"{call.name} {json.loads(call.arguments)}"


def langchain_openai(url: str, model: str) -> str:
    from langchain_openai import ChatOpenAI

    llm = ChatOpenAI(base_url=f"{url}/v1", api_key="none", model=model, temperature=0)
    bound = llm.bind_tools([TOOL], tool_choice="required", parallel_tool_calls=False)
    whole = bound.invoke(ASK).tool_calls
    pieces = list(bound.stream(ASK))
    joined = pieces[0]
    for piece in pieces[1:]:
        joined += piece
    assert [c["args"] for c in joined.tool_calls] == [c["args"] for c in whole]
    return f"{whole[0]['name']} {whole[0]['args']}"


CLIENTS: dict[str, Callable[[str, str], str]] = {
    "openai, chat": openai_chat,
    "openai, responses": openai_responses,
    "anthropic": anthropic,
    "litellm": litellm,
    "langchain-openai": langchain_openai,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--model", required=True)
    options = parser.parse_args()
    failed = 0
    for name, client in CLIENTS.items():
        package = name.partition(",")[0]
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            print(f"{name}: not installed")
            continue
        try:
            print(f"{name} {version}: {client(options.url, options.model)!r}")
        except Exception as error:
            failed += 1
            print(f"{name} {version}: FAILED {type(error).__name__}: {str(error)[:300]}")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
