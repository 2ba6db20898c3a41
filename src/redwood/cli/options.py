"""Options that several commands share, and how their values are parsed."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from redwood import _defaults
from redwood.errors import ArgumentError
from redwood.models._catalogue import DEFAULT_MODEL

if TYPE_CHECKING:
    from redwood.sampling import SamplingParams

DEFAULT_DRAFTER = "auto"
DEFAULT_TARGET = DEFAULT_MODEL
_NUMBERS = re.compile(r"\d+(,\d+)*")


def examples(*lines: str) -> str:
    """Returns the epilogue of a command's help with these examples."""
    return "\n".join(["Examples:", *(escape(f"  $ {line}") for line in lines)])


def shown(name: str, *owners: type) -> str | bool:
    """Returns the default of an option for its help: that of the first class that has one."""
    values = (vars(owner)[name] for owner in owners if name in vars(owner))
    value = next(values, None)
    return False if value is None else str(value)


def _option(name: str, help_text: str, *, panel: str, **more: Any) -> Any:
    key = name.removeprefix("--").replace("-", "_")
    return typer.Option(
        name,
        help=help_text,
        show_default=shown(key, _defaults.Sampling, _defaults.Loading),
        rich_help_panel=panel,
        **more,
    )


_MODEL, _SAMPLING = "Model", "Sampling"

Target = Annotated[
    str,
    typer.Option(
        "--target",
        "-t",
        metavar="MODEL",
        help="The model that answers: a packaged name, a folder, a .gguf file or a hub id.",
        rich_help_panel=_MODEL,
    ),
]
DrafterName = Annotated[
    str,
    typer.Option(
        "--drafter",
        "-d",
        metavar="NAME",
        help="What drafts: auto (all that costs nothing: ngram+table), none, ngram (the text "
        "itself), table (the target's own rows), index:PATH (`redwood index`), or a model; several "
        "joined with + fill one tree.",
        rich_help_panel=_MODEL,
    ),
]
Budget = Annotated[
    int | None,
    _option(
        "--budget",
        "Nodes scored per step, the root included. Left out: chosen step by step.",
        panel=_MODEL,
    ),
]
Tree = Annotated[
    str | None,
    _option(
        "--tree",
        "Shape for a model drafter: widths by level, such as 1,1,3,1, or a JSON file of parents "
        "(`redwood tree --json` writes one).",
        panel=_MODEL,
        metavar="WIDTHS|FILE",
    ),
]
LawName = Annotated[
    str | None,
    _option(
        "--law",
        "How a model drafter draws: without_replacement, with_replacement or point.",
        panel=_MODEL,
        metavar="LAW",
    ),
]
BackendName = Annotated[
    str | None,
    _option(
        "--backend", "What runs the model: auto, native or eager.", panel=_MODEL, metavar="NAME"
    ),
]
Dtype = Annotated[
    str | None,
    _option(
        "--dtype",
        "Of the eager backend: auto, float32, bfloat16 or float16.",
        panel=_MODEL,
        metavar="TYPE",
    ),
]
Device = Annotated[
    str | None, _option("--device", "auto, cpu, cuda or cuda:N.", panel=_MODEL, metavar="NAME")
]
Capacity = Annotated[
    int | None,
    _option("--capacity", "Tokens a row can hold. Left out: the model's context.", panel=_MODEL),
]
Weights = Annotated[
    str | None,
    _option(
        "--weights",
        "Of the native backend: auto (as in the file), int4, int8, bf16 or f32.",
        panel=_MODEL,
        metavar="TYPE",
    ),
]
Kv = Annotated[
    str | None,
    _option(
        "--kv",
        "Keys and values of the native backend: auto (f16), f16 or f32.",
        panel=_MODEL,
        metavar="TYPE",
    ),
]
Threads = Annotated[
    int | None,
    _option("--threads", "Of the native backend. Left out: one for each processor.", panel=_MODEL),
]
Cpus = Annotated[
    str | None,
    _option(
        "--cpus",
        "Processors to which the native backend's threads are pinned, such as 0,1.",
        panel=_MODEL,
        metavar="N,..",
    ),
]
Parallel = Annotated[
    str | None,
    _option(
        "--parallel",
        "One model over the processes that torchrun started: tensor (every layer is split) or "
        "pipeline (some layers each).",
        panel=_MODEL,
        metavar="WAY",
    ),
]
Offload = Annotated[
    str | None,
    _option(
        "--offload",
        "For a model larger than memory: where its weights stay, disk (or ram, for a GPU). Each "
        "pass reads them; --weights is then bf16, int8, int4 or f32.",
        panel=_MODEL,
        metavar="WHERE",
    ),
]
Tokenizer = Annotated[
    str | None,
    _option(
        "--tokenizer",
        "A folder with the target's tokenizer, for a .gguf file whose own is not known.",
        panel=_MODEL,
        metavar="FOLDER",
    ),
]
TablePath = Annotated[
    Path | None,
    typer.Option(
        "--table",
        metavar="FILE",
        help="Keep what the target said in this file, to draft from (--drafter auto or table). "
        "`redwood table` shows and fills it.",
        rich_help_panel=_MODEL,
    ),
]
TableSize = Annotated[
    str | None,
    _option(
        "--table-size",
        "Most memory of the table, such as 64MiB. Left out: 128MiB.",
        panel=_MODEL,
        metavar="SIZE",
    ),
]
Memory = Annotated[
    str | None,
    _option(
        "--memory",
        "With --offload: what the whole process may take, such as 2GiB. Weights that fit stay.",
        panel=_MODEL,
        metavar="SIZE",
    ),
]

MaxTokens = Annotated[
    int | None, _option("--max-tokens", "Most tokens to generate.", panel=_SAMPLING)
]
Temperature = Annotated[float | None, _option("--temperature", "0 is arg-max.", panel=_SAMPLING)]
TopP = Annotated[
    float | None,
    _option("--top-p", "Keep the best tokens with this mass, in (0, 1].", panel=_SAMPLING),
]
TopK = Annotated[
    int | None, _option("--top-k", "Keep the k best tokens; 0 keeps all.", panel=_SAMPLING)
]
MinP = Annotated[
    float | None,
    _option("--min-p", "Keep tokens with this share of the best one's chance.", panel=_SAMPLING),
]
RepetitionPenalty = Annotated[
    float | None,
    _option("--repetition-penalty", "Above 1: seen tokens become rarer.", panel=_SAMPLING),
]
PresencePenalty = Annotated[
    float | None,
    _option("--presence-penalty", "Taken off tokens already in the answer.", panel=_SAMPLING),
]
FrequencyPenalty = Annotated[
    float | None,
    _option("--frequency-penalty", "Taken off for each time in the answer.", panel=_SAMPLING),
]
LogitBias = Annotated[
    list[str] | None,
    typer.Option(
        "--logit-bias",
        metavar="ID=VALUE",
        help="Added to the score of a token. Repeatable.",
        rich_help_panel=_SAMPLING,
    ),
]
Seed = Annotated[
    int | None,
    _option("--seed", "Same seed, same text, with any drafter or none.", panel=_SAMPLING),
]
Stop = Annotated[
    list[str] | None,
    typer.Option(
        "--stop",
        metavar="TEXT",
        help="Ends the answer, and is not part of it. Repeatable.",
        rich_help_panel=_SAMPLING,
    ),
]
IgnoreEos = Annotated[
    bool,
    typer.Option(
        "--ignore-eos", help="Go on after an end-of-text token.", rich_help_panel=_SAMPLING
    ),
]
Verifier = Annotated[
    str | None,
    _option(
        "--verifier",
        "traversal, recursive, coupled, or auto: coupled with a seed, else traversal.",
        panel=_SAMPLING,
        metavar="NAME",
    ),
]
System = Annotated[
    str | None, typer.Option("--system", metavar="TEXT", help="System message of the chat.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]


def wrong(option: str, message: str) -> typer.BadParameter:
    """Returns the usage error about an option."""
    return typer.BadParameter(message, param_hint=option)


def given(**options: Any) -> dict[str, Any]:
    """Returns the options that were given, so that the library's defaults hold for the others."""
    return {
        name: value  # NOTE: by identity: 0 == False, and a temperature of 0 was given
        for name, value in options.items()
        if value is not None and value is not False and value != []
    }


def sampling(options: Mapping[str, Any]) -> SamplingParams:
    """Returns the parameters of a request from options of the same names.

    Raises:
        ArgumentError: a value out of range, with its name.
    """
    from redwood.sampling import SamplingParams

    return SamplingParams(**options)


def logit_bias(entries: Sequence[str] | None) -> dict[int, float]:
    """Returns token id -> value from ID=VALUE entries."""
    biases = {}
    for entry in entries or ():
        token, _, value = entry.partition("=")
        try:
            biases[int(token)] = float(value)
        except ValueError:
            raise wrong("--logit-bias", f"{entry!r} is not of the form ID=VALUE") from None
    return biases


def integers(option: str, text: str) -> list[int]:
    """Returns the numbers of a list such as 1,2,4."""
    if not _NUMBERS.fullmatch(text):
        raise wrong(option, f"{text!r} is not a list of numbers such as 1,2,4")
    return [int(part) for part in text.split(",")]


def rates(option: str, text: str) -> list[float]:
    """Returns the numbers of a list such as 0.8,0.1."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise wrong(option, f"{text!r} is not a list of numbers such as 0.8,0.1") from None


def times(option: str, text: str) -> dict[int, float]:
    """Returns size -> time from a list such as 1:30,4:35."""
    pairs = [part.partition(":") for part in text.split(",")]
    try:
        return {int(size): float(time) for size, _, time in pairs}
    except ValueError:
        raise wrong(option, f"{text!r} is not a list of SIZE:TIME such as 1:30,4:35") from None


def tree_parents(text: str) -> list[int]:
    """Returns parents from widths by level, or from a JSON file: a list, or `parents` in an object.

    Raises:
        ArgumentError: the file contains neither.
    """
    if _NUMBERS.fullmatch(text):
        from redwood.algorithms.specinfer import expansion_tree

        return expansion_tree(integers("--tree", text))
    path = Path(text)
    if not path.is_file():
        raise wrong("--tree", f"{text!r} is neither a file nor a list of widths such as 1,1,3,1")
    value = read_json(path)
    parents = value.get("parents") if isinstance(value, dict) else value
    if not isinstance(parents, list) or not all(type(parent) is int for parent in parents):
        raise ArgumentError(f"{path} must hold a list of parents, such as [-1, 0, 0, 1]")
    return parents


def read_text(path: Path) -> str:
    """Returns the text of a UTF-8 file.

    Raises:
        ArgumentError: a file that cannot be read, or is not UTF-8.
    """
    try:
        return path.read_bytes().decode("utf-8")
    except OSError as error:
        raise ArgumentError(f"cannot read {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ArgumentError(f"{path} is not UTF-8 text (byte {error.start})") from error


def read_json(path: Path) -> Any:
    """Returns the value in a JSON file.

    Raises:
        ArgumentError: a file that cannot be read, or is not JSON.
    """
    try:
        return json.loads(read_text(path))
    except ValueError as error:
        if isinstance(error, ArgumentError):
            raise
        raise ArgumentError(f"{path} is not JSON: {error}") from error
