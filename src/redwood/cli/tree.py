"""`redwood tree`: Sequoia's optimal tree for measured acceptance, drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from redwood.cli import options as o
from redwood.cli.groups import grouped
from redwood.cli.terminal import print_json, write
from redwood.errors import ArgumentError

if TYPE_CHECKING:
    from redwood.algorithms.sequoia import Plan


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command(
        epilog=o.examples(
            "redwood tree --acceptance 0.8,0.1,0.05 --size 16",
            "redwood tree --acceptance 0.8,0.1,0.05 --size 64 --max-levels 6 --svg tree.svg",
            "redwood tree --vector-file acceptance.json --size 12 --json > shape.json",
            "redwood tree --acceptance 0.8,0.1 --times 1:30,2:31,4:35,8:50 --draft-time 3",
        )
    )(tree)


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Acceptance rates of children by rank."""

    acceptance: Annotated[
        str | None,
        typer.Option(
            "--acceptance",
            "-a",
            metavar="P1,P2,..",
            help="Chance that the first, second, .. child is the accepted one.",
        ),
    ] = None
    vector_file: Annotated[
        Path | None,
        typer.Option(help="JSON file with these rates: a list, or a list of lists, one per level."),
    ] = None


@grouped
def tree(
    *,
    measured: Rates,
    size: Annotated[int | None, typer.Option(help="Number of nodes, the root included.")] = None,
    max_levels: Annotated[
        int | None, typer.Option(help="Most levels, the root's included.")
    ] = None,
    max_branch: Annotated[int | None, typer.Option(help="Most children of a node.")] = None,
    times: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE:TIME,..",
            help="Measured time of a target pass by number of nodes: the best size is chosen.",
        ),
    ] = None,
    draft_time: Annotated[
        float | None, typer.Option(help="Time of one draft pass, a level; in the same unit.")
    ] = None,
    svg: Annotated[Path | None, typer.Option(help="Write the picture to this file, too.")] = None,
    as_json: o.Json = False,
) -> None:
    """Draws the tree with the most expected tokens; with --times, chooses its size as well.

    A node's score is the chance that it is accepted, its rank the place among its siblings.
    """
    if (measured.acceptance is None) == (measured.vector_file is None):
        raise o.wrong("--acceptance", "give either this or --vector-file")
    from redwood.algorithms.sequoia import expected_tokens
    from redwood.cli.tree_drawing import nodes_of, text_lines
    from redwood.cli.tree_drawing import svg as draw_svg

    rates = _rates(measured.acceptance, measured.vector_file)
    bounds = {"max_levels": max_levels, "max_branch": max_branch}
    parents, plan = _chosen(rates, size, times, draft_time, bounds)
    nodes = nodes_of(parents, rates)
    tokens = expected_tokens(parents, rates)
    levels = 1 + max(node.depth for node in nodes)
    summary = f"{len(parents)} nodes, {levels} levels: {tokens:.4f} expected tokens per target pass"
    if svg is not None:
        _write_file(svg, draw_svg(parents, nodes, summary))
    if as_json:
        value: dict[str, Any] = {
            "parents": parents,
            "size": len(parents),
            "levels": levels,
            "expected_tokens": tokens,
            "nodes": [node._asdict() for node in nodes],
            "plan": None if plan is None else plan._asdict(),
        }
        print_json(value)
        return
    write("".join(f"{line}\n" for line in [*text_lines(parents, nodes), "", summary]))
    if plan is not None:
        write(
            f"best for these times: {plan.size} nodes, {plan.levels} levels: "
            f"{plan.expected_tokens:.4f} expected tokens, {plan.time_per_token:.4g} per token, "
            f"{plan.speedup:.2f} x plain decoding\n"
        )


def _chosen(
    rates: list[Any],
    size: int | None,
    times: str | None,
    draft_time: float | None,
    bounds: Mapping[str, int | None],
) -> tuple[Sequence[int], Plan | None]:
    """The parents of the tree, and the choice by time if there is one."""
    from redwood.algorithms.sequoia import choose_tree, optimal_tree

    if (times is None) != (draft_time is None):
        raise o.wrong("--times", "it goes with --draft-time: give both or none")
    plan = None
    if times is not None and draft_time is not None:
        plan = choose_tree(rates, o.times("--times", times), draft_time, **bounds)
    if size is not None:
        return optimal_tree(rates, size, **bounds), plan
    if plan is None:
        raise o.wrong("--size", "give the number of nodes, or --times to have it chosen")
    return plan.parents, plan


def _rates(acceptance: str | None, vector_file: Path | None) -> list[Any]:
    if acceptance is not None:
        return o.rates("--acceptance", acceptance)
    assert vector_file is not None
    value = o.read_json(vector_file)
    try:
        if all(isinstance(row, list) for row in value):
            return [[float(rate) for rate in row] for row in value]
        return [float(rate) for rate in value]
    except (TypeError, ValueError):
        raise ArgumentError(
            f"{vector_file} must hold a list of rates, or a list of lists of rates"
        ) from None


def _write_file(path: Path, text: str) -> None:
    try:
        path.write_text(text, "utf-8")
    except OSError as error:
        raise ArgumentError(f"cannot write {path}: {error.strerror or error}") from error
