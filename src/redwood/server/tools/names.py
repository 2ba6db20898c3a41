"""The names of the forms of tool calls, for options and help."""

from __future__ import annotations

FORMATS = (
    "qwen3-coder",
    "hermes",
    "harmony",
    "gemma4",
    "functiongemma",
    "mistral",
    "mistral-list",
    "pythonic",
    "llama3-json",
    "generic",
)
"""As in `formats.FORMATS`."""
