"""Kinds of values that requests share: strict, bounded, text in its two spellings."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict
from pydantic_core import PydanticCustomError


class Strict(BaseModel):
    """A value whose fields are all known, none converted, none infinite."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)


def _joined_text(content: Any) -> Any:
    """A string, or a list of text parts joined to one."""
    if not isinstance(content, list):
        return content
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text":
            raise PydanticCustomError(
                "content_part", "only text parts are supported, not {kind}", {"kind": repr(kind)}
            )
        if not isinstance(part.get("text"), str) or set(part) != {"type", "text"}:
            raise PydanticCustomError("content_part", "a text part has a type and a text")
        texts.append(part["text"])
    return "\n".join(texts)


def _whole(value: Any) -> Any:
    """1.0 is a whole number in JSON."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Text = Annotated[str, BeforeValidator(_joined_text)]
Whole = Annotated[int, BeforeValidator(_whole)]
