"""Output: lines, JSON, tables, and text whose drafted parts have another shade."""

from __future__ import annotations

import json
import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import IO, TYPE_CHECKING, Any, Protocol

from rich.color import ColorSystem
from rich.console import Console
from rich.style import Style
from rich.table import Table

if TYPE_CHECKING:
    from redwood.engine.detokenizer import Tokenizer
    from redwood.engine.stats import Stats

DRAFTED = Style(color="green")
_PLAIN_WIDTH = 120  # of tables that go to a file or a pipe


def stdout() -> Console:
    """Returns a console for tables and shades on stdout."""
    return Console(width=None if sys.stdout.isatty() else _PLAIN_WIDTH, highlight=False)


def stderr() -> Console:
    """Returns a console for progress and tables on stderr."""
    width = None if sys.stderr.isatty() else _PLAIN_WIDTH
    return Console(stderr=True, width=width, highlight=False)


def say(message: str) -> None:
    """Writes a message to stderr as one line; line breaks in it are replaced."""
    sys.stdout.flush()
    try:
        sys.stderr.write(" ".join(message.split()) + "\n")
        sys.stderr.flush()
    except OSError:  # stderr is closed, or its disk is full: no reason to end
        _drop(sys.stderr)


def write(text: str) -> None:
    """Writes text to stdout unchanged and flushes it."""
    sys.stdout.write(text)
    sys.stdout.flush()


def print_json(value: Any) -> None:
    """Writes a value as one line of JSON to stdout."""
    write(json.dumps(value, allow_nan=False) + "\n")


def drop_stdout() -> None:
    """Discards the rest of stdout, which cannot be written: flushing it again would fail again."""
    _drop(sys.stdout)


def _drop(stream: IO[str]) -> None:
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    except (OSError, ValueError):  # not a file, as in tests
        return


class NewText(Protocol):
    """A `Step` or a `Piece`: new text, its tokens, how many of them had been drafted."""

    @property
    def text(self) -> str:
        """New text, in whole characters."""
        ...

    @property
    def token_ids(self) -> list[int]:
        """Tokens of the step."""
        ...

    @property
    def num_accepted(self) -> int:
        """How many of the tokens had been drafted; they are the first ones."""
        ...

    @property
    def finish_reason(self) -> str | None:
        """Why the answer ended; None until then."""
        ...


class Shades:
    """Finds out which characters of an answer came from accepted drafts.

    Text may come later than its tokens (incomplete characters, possible stop strings), so tokens
    are decoded once more, one by one, and their lengths are kept until the text arrives. A
    character of several tokens belongs to the last of them.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        from redwood.engine.detokenizer import Detokenizer

        self._detokenizer = Detokenizer(tokenizer)
        self._spans: deque[tuple[int, bool]] = deque()  # characters to come, whether drafted

    def split(self, new: NewText) -> list[tuple[str, bool]]:
        """Returns the step's text in parts, and whether each of them was drafted.

        To be called for every step, in order.
        """
        for i, token in enumerate(new.token_ids):
            self._detokenizer.push(token)
            last = new.finish_reason is not None and i == len(new.token_ids) - 1
            count = len(self._detokenizer.take(final=last))
            self._spans.append((count, i < new.num_accepted))
        parts, start = list[tuple[str, bool]](), 0
        while start < len(new.text):
            count, drafted = self._spans.popleft() if self._spans else (len(new.text), False)
            end = start + count
            if end > len(new.text):
                self._spans.appendleft((end - len(new.text), drafted))
            if part := new.text[start:end]:
                before = parts.pop()[0] if parts and parts[-1][1] == drafted else ""
                parts.append((before + part, drafted))
            start = end
        return parts


def painter(tokenizer: Tokenizer, shaded: bool) -> Callable[[NewText], str]:
    """Returns a function from each step of one answer to its text for stdout, drafts shaded.

    Nothing is shaded where stdout is no terminal, or one without colours.
    """
    if not shaded or stdout().color_system is None:
        return lambda new: new.text
    shades = Shades(tokenizer)
    return lambda new: "".join(
        DRAFTED.render(part, color_system=ColorSystem.STANDARD) if drafted else part
        for part, drafted in shades.split(new)
    )


def stats_table(columns: Mapping[str, Stats]) -> Table:
    """Returns a table of the statistics of answers, a column for each."""
    rows: Iterable[tuple[str, Callable[[Stats], str]]] = [
        ("tokens", lambda s: str(s.num_generated_tokens)),
        ("tokens/s", lambda s: f"{s.tokens_per_s:.1f}"),
        ("target passes", lambda s: str(s.target_passes)),
        ("mean acceptance length", lambda s: f"{s.mean_acceptance_length:.2f}"),
        ("drafted / accepted", lambda s: f"{s.num_draft_tokens} / {s.num_accepted_tokens}"),
    ]
    table = Table("", *columns)
    for column in table.columns[1:]:
        column.justify = "right"
    for name, value in rows:
        table.add_row(name, *(value(stats) for stats in columns.values()))
    for stage in next(iter(columns.values())).seconds:
        seconds = (f"{stats.seconds[stage]:.2f}" for stats in columns.values())
        table.add_row(f"seconds: {stage}", *seconds)
    return table
