"""Where the peers live: the user's cache, apart from Redwood's own environment."""

from __future__ import annotations

from pathlib import Path

CACHE = Path("~/.cache/redwood-peers").expanduser()
OPENVINO_PYTHON = CACHE / "openvino-venv" / "bin" / "python"
EXPORT_VENV = CACHE / "export-venv"
EXPORTED = CACHE / "openvino-int4"
LLAMA_VENV = CACHE / "llama-venv"
LLAMA_BUILD = CACHE / "llama-build"
LLAMA_SERVER = LLAMA_BUILD / "bin" / "llama-server"
