"""`redwood chat`: a conversation; the oldest turns are dropped when the context is full."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from importlib import import_module
from typing import TYPE_CHECKING, Annotated, Any

import typer

from redwood.cli import options as o
from redwood.cli.generate import as_value, show
from redwood.cli.groups import Drafting, Machine, Placement, Sampling, grouped, values
from redwood.cli.loading import follow_if_not_first, open_engine
from redwood.cli.terminal import print_json, say, stats_table, stderr
from redwood.errors import ArgumentError, RedwoodError

if TYPE_CHECKING:
    from redwood.engine.stats import Stats
    from redwood.engine.text import Engine, Piece

HELP = "/reset forgets the conversation, /stats shows what answers cost, /exit (or Ctrl-D) ends"


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command(
        epilog=o.examples(
            "redwood chat",
            'redwood chat --system "Answer in one sentence." --show-drafts',
            "redwood chat --temperature 0.7 --seed 1 --max-tokens 200",
            "printf 'Hello!\\nAnd again?\\n' | redwood chat --json",
        )
    )(chat)


@grouped
def chat(
    *,
    system: o.System = None,
    show_drafts: Annotated[
        bool, typer.Option("--show-drafts", help="Show accepted drafted text in another shade.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print a line of JSON per answer, for programs.")
    ] = False,
    drafting: Drafting,
    machine: Machine,
    placement: Placement,
    sampling: Sampling,
) -> None:
    """Talks with a model. Ctrl-C stops an answer, Ctrl-D ends; /help lists the commands.

    Without a terminal, each line of stdin is a message.
    """
    if show_drafts and as_json:
        raise o.wrong("--show-drafts", "--json has no shades")
    settings = sampling.given()
    most = o.sampling(settings).max_tokens
    follow_if_not_first(placement.parallel, drafting.target, machine)
    with open_engine(**values(drafting, machine, placement)) as engine:
        talk = Conversation(engine, settings, most, system)
        Chat(talk, interactive=sys.stdin.isatty(), shaded=show_drafts, as_json=as_json).run()


class Conversation:
    """The messages so far, and the next answer.

    Args:
        engine: its model must have a chat template.
        settings: fields of `SamplingParams`.
        max_tokens: of an answer; so much of the context is reserved for it, up to a quarter.
        system: the system message, which is never dropped.

    Raises:
        ArgumentError: no chat template.
    """

    def __init__(
        self, engine: Engine, settings: Mapping[str, Any], max_tokens: int, system: str | None
    ) -> None:
        if not engine.tokenizer.chat_template:
            raise ArgumentError("this model has no chat template: use redwood generate --raw")
        self.engine = engine
        self._settings = dict(settings)
        self._reserve = min(max_tokens, engine.target.capacity // 4)
        self._first = [] if system is None else [{"role": "system", "content": system}]
        self.messages = list(self._first)

    def reset(self) -> None:
        """Drops all messages but the system message."""
        self.messages = list(self._first)

    def ask(self, text: str) -> tuple[Iterator[Piece], int]:
        """Returns the pieces of the answer and how many old turns were dropped.

        `answered` must be called afterwards, unless this raises, which changes nothing.

        Raises:
            CapacityError: the message alone does not fit.
        """
        messages, dropped = [*self.messages, {"role": "user", "content": text}], 0
        prompt = self.engine.encode(messages)
        most = self.engine.target.capacity - self._reserve
        while len(prompt) > most and len(messages) > len(self._first) + 1:
            end = len(self._first) + 1
            while messages[end]["role"] != "user":
                end += 1
            del messages[len(self._first) : end]
            dropped += 1
            prompt = self.engine.encode(messages)
        pieces = self.engine.stream(prompt, **self._settings)
        self.messages = messages
        return pieces, dropped

    def answered(self, text: str) -> None:
        """Adds the answer, whole or cut, to the messages; if it is empty, drops the question."""
        if text:
            self.messages.append({"role": "assistant", "content": text})
        else:
            self.messages.pop()


class Chat:
    """Reads messages from a terminal or a pipe and writes the answers of a conversation."""

    def __init__(
        self, conversation: Conversation, *, interactive: bool, shaded: bool, as_json: bool
    ) -> None:
        self._conversation, self._interactive = conversation, interactive
        self._shaded, self._as_json = shaded, as_json
        self._spent: list[Stats] = []

    def run(self) -> None:
        """Answers until the messages end.

        Raises:
            RedwoodError: an answer failed. Not on a terminal: the error is shown there, and the
                conversation goes on.
        """
        if self._interactive:
            say(HELP)
        for line in self._lines():
            if line.startswith("/"):
                if line in ("/exit", "/quit"):
                    return
                self._command(line)
            elif line:
                try:
                    self._answer(line)
                except RedwoodError as error:
                    if not self._interactive:
                        raise
                    say(f"error: {error}")

    def _command(self, line: str) -> None:
        if line == "/reset":
            self._conversation.reset()
            say("the conversation starts anew")
        elif line == "/help":
            say(HELP)
        elif line == "/stats" and self._spent:
            stderr().print(stats_table({"last answer": self._spent[-1], "all": self._total()}))
        elif line == "/stats":
            say("no answer so far")
        else:
            say(f"unknown command {line.split()[0]}: {HELP}")

    def _answer(self, text: str) -> None:
        pieces, dropped = self._conversation.ask(text)
        if dropped:
            capacity = self._conversation.engine.target.capacity
            say(
                f"the oldest {'turn was' if dropped == 1 else f'{dropped} turns were'} dropped: "
                f"the context holds {capacity} tokens"
            )
        shown: list[Piece] = []
        try:
            if self._as_json:
                shown.extend(pieces)
            else:
                show(_recorded(pieces, shown), self._tokenizer, shaded=self._shaded)
        except KeyboardInterrupt:
            if not self._interactive:
                raise
            say("(stopped)")
        finally:
            self._conversation.answered("".join(shown))
            if shown:
                self._spent.append(shown[-1].stats)
        if self._as_json and shown:
            print_json({"message": text, **as_value(shown), "dropped_turns": dropped})

    @property
    def _tokenizer(self) -> Any:
        return self._conversation.engine.tokenizer

    def _total(self) -> Stats:
        from redwood.engine.stats import Stats

        total = Stats()
        for spent in self._spent:
            for name, value in vars(spent).items():
                if name == "seconds":
                    for stage, seconds in value.items():
                        total.seconds[stage] += seconds
                else:
                    setattr(total, name, getattr(total, name) + value)
        return total

    def _lines(self) -> Iterator[str]:
        if not self._interactive:
            for line in sys.stdin.buffer:
                yield line.decode("utf-8", errors="replace").strip()
            return
        with suppress(ImportError):  # line editing and history in input()
            import_module("readline")
        while True:
            try:
                yield input("> ").strip()
            except EOFError:
                print()
                return
            except KeyboardInterrupt:
                print()
                say("Ctrl-D or /exit ends")


def _recorded(pieces: Iterator[Piece], into: list[Piece]) -> Iterator[Piece]:
    """Yields the pieces and appends them to `into`, so that a cut answer is kept as well."""
    for piece in pieces:
        into.append(piece)
        yield piece
