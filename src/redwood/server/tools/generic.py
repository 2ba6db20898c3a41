"""Tools for a model whose chat template knows none: described in a message, called in Hermes' form.

Only on demand (`--tool-parser generic`): how well it works is up to the model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

_HOW = """You can call these tools. Each line describes one, with a JSON schema of its arguments:

{tools}

To call a tool, write nothing but this, for each call:
<tool_call>
{{"name": "the tool's name", "arguments": {{...}}}}
</tool_call>
What it returned comes in the next message. Answer without a call where none is needed."""


def described(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Returns a chat without tools, calls and tool messages that says the same in its texts."""
    made = [_plain(message) for message in messages]
    if tools:
        lines = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
        how = _HOW.format(tools=lines)
        if made and made[0]["role"] == "system":
            made[0]["content"] += "\n\n" + how
        else:
            made.insert(0, {"role": "system", "content": how})
    return _joined(made)


def _plain(message: Mapping[str, Any]) -> dict[str, Any]:
    content = message["content"]
    if message["role"] == "tool":
        return {"role": "user", "content": f"<tool_response>\n{content}\n</tool_response>"}
    calls = [
        f"<tool_call>\n{json.dumps(_named(call['function']), ensure_ascii=False)}\n</tool_call>"
        for call in message.get("tool_calls", ())
    ]
    kept = {key: value for key, value in message.items() if key in ("role", "name")}
    return {**kept, "content": "\n".join([content, *calls] if content else calls)}


def _named(function: Mapping[str, Any]) -> dict[str, Any]:
    return {"name": function["name"], "arguments": function["arguments"]}


def _joined(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Results of several calls are one message: roles must take turns in many templates."""
    made: list[dict[str, Any]] = []
    for message in messages:
        last = made[-1] if made else None
        mark = "<tool_response>"
        if last and last["role"] == "user" and last["content"].startswith(mark):
            if message["role"] == "user" and message["content"].startswith(mark):
                last["content"] += "\n" + message["content"]
                continue
        made.append(dict(message))
    return made
