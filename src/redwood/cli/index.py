"""`redwood index`: datastores of tokenised text to draft from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.filesize import decimal
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from redwood.cli import options as o
from redwood.cli.terminal import print_json, say, stderr, stdout, write

if TYPE_CHECKING:
    from redwood.datastore.build import Added
    from redwood.datastore.sources import Documents, SourceFile
    from redwood.datastore.store import Manifest

Store = Annotated[Path, typer.Argument(metavar="PATH", help="Folder of the datastore.")]
_SOURCES = "Text files, folders of them, .jsonl files of chats (docs/datastore.md)."


def register(app: typer.Typer) -> None:
    """Adds the group."""
    group = typer.Typer(
        no_args_is_help=True,
        help="Makes, extends, shows, checks and removes datastores: text that drafts come from.",
    )
    group.command(
        epilog=o.examples(
            "redwood index create answers.index chats.jsonl notes/",
            "redwood index create code.index src/ --target qwen2.5-coder-1.5b-instruct",
            "redwood generate 'Hello' --drafter ngram+index:answers.index",
        )
    )(create)
    group.command(
        epilog=o.examples(
            "redwood index add answers.index more.jsonl",
            "redwood index add answers.index today.jsonl --most-tokens 50000000",
        )
    )(add)
    group.command(epilog=o.examples("redwood index info answers.index --json"))(info)
    group.command(epilog=o.examples("redwood index verify answers.index"))(verify)
    group.command(epilog=o.examples("redwood index remove answers.index"))(remove)
    app.add_typer(group, name="index")


def create(
    path: Store,
    sources: Annotated[
        list[Path] | None, typer.Argument(metavar="SOURCE...", help=_SOURCES)
    ] = None,
    target: o.Target = o.DEFAULT_TARGET,
    chunk_tokens: Annotated[
        int | None,
        typer.Option(help="Tokens sorted together: an addition sorts the last chunk anew."),
    ] = None,
    tokenizer: o.Tokenizer = None,
    as_json: o.Json = False,
) -> None:
    """Makes a datastore for a model's tokenizer, with the text of files; empty without any."""
    from redwood.datastore import build
    from redwood.datastore.sources import find_files

    files = find_files(sources or [])
    speaks = _tokenizer(target, tokenizer)
    with _reading(files, speaks) as documents:
        made = build.create(
            path,
            speaks,
            documents,
            name=_full_name(target),
            **o.given(chunk_tokens=chunk_tokens),
        )
    held = made.manifest
    _report(path, build.Added(held.num_documents, held.num_tokens, held), as_json)


def add(
    path: Store,
    sources: Annotated[list[Path], typer.Argument(metavar="SOURCE...", help=_SOURCES)],
    target: Annotated[
        str | None,
        typer.Option(
            "--target", "-t", metavar="MODEL", help="Whose tokenizer. Left out: the same as before."
        ),
    ] = None,
    most_tokens: Annotated[
        int | None, typer.Option(help="Drop the oldest chunks beyond so many tokens.")
    ] = None,
    tokenizer: o.Tokenizer = None,
    as_json: o.Json = False,
) -> None:
    """Adds the text of files to a datastore, all of it or nothing."""
    from redwood.datastore import build
    from redwood.datastore.sources import find_files
    from redwood.datastore.store import read_manifest

    manifest, files = read_manifest(path), find_files(sources)
    name = target or manifest.tokenizer.name
    if not name:
        raise o.wrong("--target", f"{path} does not say whose tokenizer it was made with: give it")
    speaks = _tokenizer(name, tokenizer)
    with _reading(files, speaks) as documents:
        added = build.add(path, documents, tokenizer=speaks, most_tokens=most_tokens)
    _report(path, added, as_json)


def info(path: Store, as_json: o.Json = False) -> None:
    """Shows what a datastore holds."""
    from redwood.datastore.store import Datastore

    manifest = Datastore.open(path).manifest
    if as_json:
        print_json({"path": str(path), **_facts(manifest), "chunks": asdict(manifest)["chunks"]})
        return
    table = Table("", str(path))
    for name, value in {**_facts(manifest), "chunks": len(manifest.chunks)}.items():
        shown = decimal(value) if name == "size_bytes" else str(value)
        table.add_row(name.removesuffix("_bytes").replace("_", " "), shown)
    stdout().print(table)


def verify(path: Store, as_json: o.Json = False) -> None:
    """Reads every chunk, compares its sha256 and checks that its suffixes are in order."""
    from redwood.datastore.store import Datastore

    with stderr().status(f"Reading {path}"):
        Datastore.open(path).verify()
    if as_json:
        print_json({"path": str(path), "intact": True})
    else:
        write(f"{path}: intact\n")


def remove(path: Store, as_json: o.Json = False) -> None:
    """Removes a datastore; a folder with anything else in it is refused."""
    from redwood.datastore import remove as remove_store

    freed = remove_store(path)
    if as_json:
        print_json({"path": str(path), "freed_bytes": freed})
    else:
        write(f"{path}: {decimal(freed)} freed\n")


def _full_name(target: str) -> str:
    """The absolute path of a model that is a path, so that `add` finds it from any folder."""
    path = Path(target).expanduser()
    return str(path.resolve()) if path.exists() else target


def _tokenizer(name: str, own: str | None) -> Any:
    """The tokenizer of a model, or the one in the folder `own` if given."""
    if own is not None:
        from redwood.engine.load import own_tokenizer

        return own_tokenizer(Path(own), name)
    from redwood.models import locate
    from redwood.models.tokenizer import load_tokenizer

    folder = locate(name, progress=True)[0]
    with stderr().status(f"Loading the tokenizer of {name}"):
        from transformers.utils import logging

        logging.set_verbosity_error()  # it warns of texts longer than the model's context
        return load_tokenizer(folder)


@contextmanager
def _reading(files: Sequence[SourceFile], tokenizer: Any) -> Iterator[Documents]:
    """The documents of files, with a progress bar; at the end, reports files that were skipped."""
    from redwood.datastore.sources import Documents

    console = stderr()
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,  # elsewhere it would leave an empty line
    ) as progress:
        task = progress.add_task("Reading", total=sum(file.size_bytes for file in files))
        documents = Documents(files, tokenizer, lambda size: progress.advance(task, size))
        yield documents
    if documents.skipped:
        say(f"left out {len(documents.skipped)} files that are no UTF-8 text")


def _facts(manifest: Manifest) -> dict[str, Any]:
    return {
        "tokens": manifest.num_tokens,
        "documents": manifest.num_documents,
        "size_bytes": manifest.size_bytes,
        "chunk_tokens": manifest.chunk_tokens,
        "tokenizer": manifest.tokenizer.name,
        "vocab_size": manifest.tokenizer.vocab_size,
        "tokenizer_sha256": manifest.tokenizer.sha256,
        "format": manifest.format,
    }


def _report(path: Path, added: Added, as_json: bool) -> None:
    manifest = added.manifest
    if as_json:
        counts = {"added_documents": added.num_documents, "added_tokens": added.num_tokens}
        print_json({"path": str(path), **counts, **_facts(manifest)})
    else:
        write(
            f"{path}: {added.num_documents} documents, {added.num_tokens} tokens added; "
            f"it holds {manifest.num_tokens} tokens, {decimal(manifest.size_bytes)}\n"
        )
