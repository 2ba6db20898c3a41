"""What tests of tool calls share: tools, a template that speaks Hermes' form, merged parts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from redwood.server.tools.parts import CallArguments, Part, Reasoning, Text

HERMES = (
    "{% for t in tools or [] %}{{ t.function.name }} {% endfor %}"
    "{% for m in messages %}{{ m.role }}:{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}"
    "{{ '\\n' }}{% endfor %}"
)
"""A chat template in Hermes' form, as small as can be."""

THINKING = HERMES + (
    "{% if add_generation_prompt %}<think>"
    "{% if enable_thinking is defined and not enable_thinking %}</think>{% endif %}{% endif %}"
)
"""The same, of a model that reasons where it is not told not to."""


def tool(name: str, **properties: Any) -> dict[str, Any]:
    """A tool all of whose arguments are required."""
    schema = {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }
    return {
        "type": "function",
        "function": {"name": name, "description": f"It is {name}.", "parameters": schema},
    }


def merged(parts: Iterable[Part]) -> list[Part]:
    """Parts with neighbours of one kind joined, as a client joins them."""
    made: list[Part] = []
    for part in parts:
        last = made[-1] if made else None
        if isinstance(part, Text | Reasoning | CallArguments) and type(last) is type(part):
            assert isinstance(last, Text | Reasoning | CallArguments)
            if getattr(last, "index", None) == getattr(part, "index", None):
                made[-1] = replace(last, text=last.text + part.text)
                continue
        made.append(part)
    return made


def read(reader: Any, pieces: Sequence[str], *, complete: bool = True) -> list[Part]:
    """What a reader makes of an answer that comes in these pieces."""
    made = [part for piece in pieces for part in reader.feed(piece)]
    return merged([*made, *reader.finish(complete=complete)])
