"""`redwood generate`: one prompt, one answer."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from redwood.cli import options as o
from redwood.cli.groups import Drafting, Machine, Placement, Sampling, grouped, values
from redwood.cli.loading import follow_if_not_first, open_engine
from redwood.cli.terminal import painter, print_json, say, stats_table, stderr, stdout, write
from redwood.errors import ArgumentError

if TYPE_CHECKING:
    from redwood.engine.text import Engine, Piece, Prompt


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command(
        epilog=o.examples(
            'redwood generate "Name three trees."',
            "redwood generate --file notes.txt --max-tokens 400 --show-drafts",
            'git diff | redwood generate --system "Describe this change in one line."',
            "redwood generate --raw 'def fib(n):' --temperature 0.8 --seed 7 --json",
            "redwood generate --file task.txt --prediction old.py --max-tokens 2000 > new.py",
            "redwood generate --target qwen2.5-coder-1.5b-instruct "
            "--drafter qwen2.5-coder-0.5b-instruct+ngram --budget 16 'Sort a list in C.'",
        )
    )(generate)


@dataclass(frozen=True, kw_only=True)
class Asked:
    """The prompt, in one of the ways to give it."""

    words: Annotated[
        str | None, typer.Argument(metavar="PROMPT", help="The prompt; - reads stdin.")
    ] = None
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", metavar="TEXT", help="The prompt.")
    ] = None
    file: Annotated[
        Path | None,
        typer.Option("--file", "-f", help="A file with the prompt; its last newline is dropped."),
    ] = None


@grouped
def generate(
    *,
    asked: Asked,
    system: o.System = None,
    prediction: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="A file that the answer is expected to be, more or less: drafted."
        ),
    ] = None,
    logprobs: Annotated[
        int | None,
        typer.Option(metavar="N", help="With --json: log-probabilities, and the N best (0 to 20)."),
    ] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the text as it is: no chat template.")
    ] = False,
    show_drafts: Annotated[
        bool, typer.Option("--show-drafts", help="Show accepted drafted text in another shade.")
    ] = False,
    no_stream: Annotated[
        bool, typer.Option("--no-stream", help="Print the answer when it is complete.")
    ] = False,
    stats: Annotated[
        bool, typer.Option("--stats", help="Print a table of what it cost on stderr.")
    ] = False,
    as_json: o.Json = False,
    drafting: Drafting,
    machine: Machine,
    placement: Placement,
    sampling: Sampling,
) -> None:
    """Answers one prompt, given as argument, --prompt, --file or stdin, as a stream of text."""
    if show_drafts and as_json:
        raise o.wrong("--show-drafts", "--json has no shades")
    if raw and system is not None:
        raise o.wrong("--system", "--raw has no chat, so no system message")
    if logprobs is not None and not as_json:
        raise o.wrong("--logprobs", "they are shown with --json only")
    follow_if_not_first(placement.parallel, drafting.target, machine)
    text = _read_prompt(asked.words, asked.prompt, asked.file)
    predicted = None if prediction is None else o.read_text(prediction)
    settings = {**sampling.given(), **o.given(logprobs=logprobs)}
    o.sampling(settings)  # checked before a model is loaded
    engine = open_engine(**values(drafting, machine, placement))
    if predicted is not None:
        settings["prediction"] = predicted
    with engine:
        pieces = engine.stream(_question(engine, text, system, raw), **settings)
        if as_json:
            shown = list(pieces)
            print_json({**as_value(shown), **_asked(drafting), "seed": sampling.seed})
        else:
            shown = show(pieces, engine.tokenizer, shaded=show_drafts, at_once=no_stream)
    if stats:
        stderr().print(stats_table({drafting.drafter: shown[-1].stats}))


def _asked(drafting: Drafting) -> dict[str, str]:
    return {"target": drafting.target, "drafter": drafting.drafter}


def show(
    pieces: Iterator[Piece], tokenizer: Any, *, shaded: bool = False, at_once: bool = False
) -> list[Piece]:
    """Writes an answer to stdout as it comes, with a final newline; returns the pieces.

    The newline is written also when the answer ends with an error or Ctrl-C.
    """
    if shaded and stdout().color_system is None:
        say("--show-drafts: stdout shows no colours, so nothing is shaded")
    paint = painter(tokenizer, shaded)
    shown: list[Piece] = []
    try:
        held = []
        for piece in pieces:
            shown.append(piece)
            held.append(paint(piece))
            if not at_once or piece.finish_reason is not None:
                write("".join(held))
                held = []
    finally:
        text = "".join(shown)
        if text and not text.endswith("\n"):
            write("\n")
    return shown


def as_value(pieces: Sequence[Piece]) -> dict[str, Any]:
    """Returns an answer, whole or cut, as plain values for JSON."""
    value: dict[str, Any] = {
        "text": "".join(pieces),
        "token_ids": [token for piece in pieces for token in piece.token_ids],
        "finish_reason": pieces[-1].finish_reason,
        "stats": pieces[-1].stats.to_dict(),
    }
    if pieces[-1].logprobs is not None:
        entries = [entry for piece in pieces for entry in piece.logprobs or ()]
        value["logprobs"] = [entry._asdict() for entry in entries]
    return value


def _read_prompt(words: str | None, prompt: str | None, file: Path | None) -> str:
    sources = {"PROMPT": words, "--prompt": prompt, "--file": file}
    named = [name for name, value in sources.items() if value is not None]
    if len(named) > 1:
        raise o.wrong(named[1], f"the prompt was given already by {named[0]}: give one")
    text = words if words is not None else prompt
    if file is not None:
        text = o.read_text(file).removesuffix("\n")
    elif text is None or words == "-":
        if sys.stdin.isatty():
            raise o.wrong("PROMPT", "there is none: give it as argument, --prompt, --file or stdin")
        text = _read_stdin()
    if not text:
        raise ArgumentError("the prompt is empty: give some text")
    if any("\ud800" <= sign <= "\udfff" for sign in text):
        raise ArgumentError("the prompt is not UTF-8 text")
    return text


def _read_stdin() -> str:
    try:
        return sys.stdin.buffer.read().decode("utf-8").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise ArgumentError(f"stdin is not UTF-8 text (byte {error.start})") from error


def _question(engine: Engine, text: str, system: str | None, raw: bool) -> Prompt:
    """The prompt as chat messages if the model has a chat template, else as plain text."""
    if raw or not engine.tokenizer.chat_template:
        if system is not None:
            raise ArgumentError("this model has no chat template, so --system cannot be used")
        return text
    messages = [{"role": "user", "content": text}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    return messages
