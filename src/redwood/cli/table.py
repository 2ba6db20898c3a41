"""`redwood table`: successor tables (the target's own output) in files, to draft from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.filesize import decimal
from rich.progress import Progress
from rich.table import Table

from redwood.cli import options as o
from redwood.cli.groups import Machine, Offloading, grouped, values
from redwood.cli.loading import open_engine
from redwood.cli.terminal import print_json, say, stderr, stdout, write
from redwood.errors import ArgumentError, TableError

if TYPE_CHECKING:
    from redwood.engine.text import Engine
    from redwood.table import KeptTable, TableInfo

Kept = Annotated[Path, typer.Argument(metavar="FILE", help="The table.")]
_ROWS = 16  # prompts that are answered at once
_SAVE_S = 60.0


def register(app: typer.Typer) -> None:
    """Adds the group."""
    group = typer.Typer(
        no_args_is_help=True,
        help="Fills, shows, checks and empties tables of what a target said (docs/table.md).",
    )
    group.command(
        epilog=o.examples(
            "redwood table create said.table --prompts prompts.jsonl",
            "redwood table create code.table src/ --target qwen2.5-coder-1.5b-instruct",
            "redwood generate 'Hello' --drafter auto --table said.table",
        )
    )(create)
    group.command(epilog=o.examples("redwood table info said.table --json"))(info)
    group.command(epilog=o.examples("redwood table verify said.table"))(verify)
    group.command(epilog=o.examples("redwood table clear said.table"))(clear)
    app.add_typer(group, name="table")


@grouped
def create(
    *,
    path: Kept,
    sources: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="TEXT...",
            help="Texts that the target reads: files, folders of them, .jsonl files.",
        ),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            "--prompts",
            metavar="FILE",
            help="Prompts that the target answers: lines of JSON with `prompt` or `turns`.",
        ),
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")] = 128,
    together: Annotated[int, typer.Option(min=1, help="Prompts answered at once.")] = _ROWS,
    raw: Annotated[bool, typer.Option("--raw", help="No chat template.")] = False,
    target: o.Target = o.DEFAULT_TARGET,
    table_size: o.TableSize = None,
    tokenizer: o.Tokenizer = None,
    as_json: o.Json = False,
    machine: Machine,
    offloading: Offloading,
) -> int:
    """Fills a table, a new one or more of an old one, with what the target says.

    From prompts that it answers, from texts that it reads, or both. What was done is saved every
    minute and at Ctrl-C; the same command goes on from there.
    """
    from redwood.cli.bench import encode_task, read_tasks
    from redwood.datastore.sources import find_files

    if prompts is None and not sources:
        raise o.wrong("TEXT", "there is nothing to fill it from: give texts, or --prompts FILE")
    tasks = [] if prompts is None else read_tasks(prompts)
    files = find_files(sources or [])
    options = values(machine, offloading)
    options |= dict(table=path, table_size=table_size, tokenizer=tokenizer, max_rows=together)
    with open_engine(target, "auto", **options) as engine:
        builder = _TableBuilder(engine, _kept_of(engine))
        try:
            if prompts is not None:
                chats = [encode_task(engine, task, prompts, raw) for task in tasks]
                builder.answer(chats, max_tokens, together)
            for file in files:
                builder.read(file)
        except KeyboardInterrupt:
            builder.save()
            say(f"{path}: what was done is kept; the same command goes on from there")
            return 130
        builder.save()
    found = _info_of(path)
    if as_json:
        print_json({"path": str(path), **_facts(found)})
    else:
        write(f"{path}: {found.rows} rows of the target, {found.entries} entries\n")
    return 0


class _TableBuilder:
    """Fills a table from prompts and texts, part by part; the file records which parts are done."""

    def __init__(self, engine: Engine, kept: KeptTable) -> None:
        if not kept.writable:
            raise TableError(f"another process keeps {kept.path}: end it, or choose another file")
        self._engine, self._kept = engine, kept
        self._filled = dict(kept.filled)
        self._saved_s = monotonic()

    def save(self) -> None:
        """Writes the table, and which parts are done."""
        self._kept.save(self._filled)
        self._saved_s = monotonic()

    def _done(self, source: str, parts: int) -> None:
        self._filled[source] = parts
        if monotonic() - self._saved_s > _SAVE_S:
            self.save()

    def answer(self, prompts: list[list[int]], max_tokens: int, together: int) -> None:
        """Answers prompts at temperature 0, `together` at once, but those that are done already."""
        from redwood._storage import digest

        source = digest(f"prompts {max_tokens} {prompts}")
        done = min(self._filled.get(source, 0), len(prompts))
        with _progress("Answering", len(prompts), done) as advance:
            while done < len(prompts):
                group = prompts[done : done + together]
                self._engine.generate(group, max_tokens=max_tokens)
                done += len(group)
                self._done(source, done)
                advance(len(group))

    def read(self, file: Any) -> None:
        """Reads the texts of a file, but those that are done already."""
        from redwood._storage import sha256_of
        from redwood.datastore.sources import Documents
        from redwood.table.reading import parts_of, read_part

        engine, table = self._engine, self._kept.table
        source = f"text {sha256_of(file.path)}"
        known = self._filled.get(source, 0)
        documents = Documents([file], engine.tokenizer)
        texts = [list(document) for document in documents]
        if documents.skipped:
            say(f"left out {file.path}, which is no UTF-8 text")
        parts = [part for text in texts for part in parts_of(text, engine.target.capacity)]
        total, read = sum(map(len, parts)), sum(map(len, parts[:known]))
        with _progress(f"Reading {file.path.name}", total, read) as advance:
            for number, part in enumerate(parts[known:], start=known + 1):
                if max(part) >= engine.target.vocab_size:
                    raise ArgumentError(f"{file.path} holds a token that this model does not have")
                read_part(engine.target, table, part, advance)
                self._done(source, number)


def _kept_of(engine: Engine) -> KeptTable:
    kept: KeptTable = engine.kept_tables[0]
    return kept


@contextmanager
def _progress(what: str, total: int, done: int) -> Iterator[Callable[[int], None]]:
    console = stderr()
    bar = Progress(console=console, transient=True, disable=not console.is_terminal)
    with bar:
        task = bar.add_task(what, total=total, completed=done)
        yield lambda count: bar.advance(task, count)


def info(path: Kept, as_json: o.Json = False) -> None:
    """Shows what a table holds."""
    found = _info_of(path)
    facts = _facts(found)
    if as_json:
        print_json({"path": str(path), **facts, "size_bytes": path.stat().st_size})
        return
    table = Table("", str(path))
    for name, value in facts.items():
        table.add_row(name.replace("_", " "), str(value))
    table.add_row("size", decimal(path.stat().st_size))
    stdout().print(table)


def verify(path: Kept, as_json: o.Json = False) -> None:
    """Reads everything, compares its sha256, and checks every entry."""
    from redwood.table import check_file

    with stderr().status(f"Reading {path}"):
        check_file(path)
    if as_json:
        print_json({"path": str(path), "intact": True})
    else:
        write(f"{path}: intact\n")


def clear(path: Kept, as_json: o.Json = False) -> None:
    """Forgets what a table holds; it stays the table of its model."""
    from redwood.table.file import clear_table

    freed = clear_table(path)
    if as_json:
        print_json({"path": str(path), "freed_bytes": freed})
    else:
        write(f"{path}: empty, {decimal(freed)} freed\n")


def _info_of(path: Path) -> TableInfo:
    from redwood.table import read_info

    return read_info(path)


def _facts(found: TableInfo) -> dict[str, Any]:
    known = asdict(found)
    return {
        "entries": found.entries,
        "rows": found.rows,
        "target": found.target.name,
        "vocab_size": found.target.vocab_size,
        "weights": found.target.weights,
        "tokenizer_sha256": found.target.tokenizer,
        "sources": len(found.filled),
        "redwood": known["redwood"],
    }
