"""The `redwood` command: its subcommands, its version, and how errors are reported."""

from __future__ import annotations

import errno
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from redwood import __version__
from redwood.cli import (
    bench,
    calibrate,
    chat,
    demo,
    deploy,
    generate,
    index,
    models,
    serve,
    table,
    tree,
    tune,
)
from redwood.cli.options import examples
from redwood.cli.terminal import drop_stdout, say
from redwood.errors import RedwoodError

_INTERRUPTED = 130
_BROKEN_PIPE = 1  # Click's code, too


class _Group(TyperGroup):
    """Ends every error in one line on stderr and an exit code; REDWOOD_DEBUG=1 adds tracebacks."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        """Runs the command line; in standalone mode it ends the process, as is usual."""

        def run() -> Any:
            return super(_Group, self).main(
                args, prog_name, complete_var, False, windows_expand_args, **extra
            )

        if not standalone_mode:
            return run()
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):  # printing never fails
                stream.reconfigure(errors="replace")
        sys.exit(_exit_code(run))


def _exit_code(run: Any) -> int:
    try:
        try:
            result = run()
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # the reader has closed its end, as `head` does
        drop_stdout()
        return _BROKEN_PIPE
    except typer.Abort:
        result = _INTERRUPTED
    except Exception as error:
        if os.environ.get("REDWOOD_DEBUG"):
            traceback.print_exc()
        return _explain(error)
    if result == _INTERRUPTED:
        say("interrupted")
    return result if isinstance(result, int) else 0


def _explain(error: Exception) -> int:
    """Writes the error as one line to stderr; returns the exit code."""
    # Usage errors are Click's, which Typer may bundle: so they are recognised by their methods.
    if hasattr(error, "format_message"):
        message = _usage_line(error)
        if message:
            say(f"error: {message}")
        return int(getattr(error, "exit_code", 2))
    if isinstance(error, RedwoodError):
        say(f"error: {error}")
    elif isinstance(error, OSError) and error.filename is None:
        # Probably of stdout, on a full disk or closed: flushing it again would fail again.
        drop_stdout()
        closed = error.errno == errno.EBADF
        why = "stdout is closed" if closed else error.strerror or str(error)
        say(f"error: cannot read or write: {why}")
    elif isinstance(error, OSError):
        say(f"error: {error.filename}: {error.strerror or error}")
    elif isinstance(error, MemoryError) or "OutOfMemory" in type(error).__name__:
        say("error: out of memory: use a smaller model, --capacity or --budget")
    else:
        say(
            f"error: unexpected {type(error).__name__}: {error} "
            "(a bug in Redwood; REDWOOD_DEBUG=1 shows where)"
        )
    return 1


def _usage_line(error: Any) -> str:
    hint = getattr(error, "param_hint", None)
    message = str(error.format_message()).strip()
    if isinstance(hint, str):
        message = f"{hint}: {error.message}"
    context = getattr(error, "ctx", None)
    if not message:  # called without arguments: the help has been printed
        return ""
    path = getattr(context, "command_path", None) or "redwood"
    return f"{message[0].lower()}{message[1:].rstrip('.')} (see {path} --help)"


app = typer.Typer(
    cls=_Group,
    name="redwood",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=examples(
        "redwood demo",
        'redwood generate "Write a haiku about trees." --show-drafts',
        "redwood chat --target smollm2-135m-instruct",
        "redwood tree --acceptance 0.8,0.1,0.05 --size 16",
        "redwood generate --help",
    ),
)


def _show_version(wanted: bool) -> None:
    if wanted:
        sys.stdout.write(f"redwood {__version__}\n")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show it.")
    ] = False,
) -> None:
    """Makes language models answer faster through token trees, with the same distribution."""


generate.register(app)
chat.register(app)
serve.register(app)
deploy.register(app)
tree.register(app)
models.register(app)
index.register(app)
table.register(app)
bench.register(app)
calibrate.register(app)
tune.register(app)
demo.register(app)
