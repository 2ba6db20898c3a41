"""Options of how prompts are read, and of what stays of them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

_PANEL = "Model"

KvCache = Annotated[
    str | None,
    typer.Option(
        "--kv-cache",
        metavar="SIZE",
        help="Keys and values of earlier prompts and answers that stay, such as 2GiB; 0: none. "
        "Left out: a fifth of free memory on the native backend, else none.",
        show_default=False,
        rich_help_panel=_PANEL,
    ),
]
KvCacheFile = Annotated[
    Path | None,
    typer.Option(
        "--kv-cache-file",
        metavar="FILE",
        help="Keep them over a restart, too: read at the start, written at the end.",
        show_default=False,
        rich_help_panel=_PANEL,
    ),
]
PrefillBeside = Annotated[
    int | None,
    typer.Option(
        "--prefill-beside",
        help="Prompt tokens read in a pass that decodes other answers, too. Left out: 8 on the "
        "native backend.",
        show_default=False,
        rich_help_panel=_PANEL,
    ),
]
CheckpointTokens = Annotated[
    int | None,
    typer.Option(
        "--checkpoint-tokens",
        help="Of a target with recurrent layers on the native backend: tokens from one kept state "
        "to the next, so that other prompts may begin there; 0: none.",
        min=0,
        show_default="512",
        rich_help_panel=_PANEL,
    ),
]
