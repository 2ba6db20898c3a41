"""A profile as tables on the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from redwood.cli.terminal import stdout, write

if TYPE_CHECKING:
    from redwood.bench.choice import Choice
    from redwood.profiling.latency import LatencyModel
    from redwood.profiling.profile import Profile

_SHOWN_RANKS = 3
_SHOWN_SIZES = (2, 4, 8, 16, 32, 64)


def show(profile: Profile, choices: Sequence[Choice], path: Path) -> None:
    """Writes times, acceptance, tokens per pass and the choices to stdout."""
    key = profile.key
    write(f"{key.target}, {key.backend} backend on {key.device}, {key.processor}\n")
    for title, table in _tables(profile, choices):
        if table.row_count:
            write(f"\n{title}\n")
            stdout().print(table)
    write(f"\nmade {profile.made}, kept in {path}\n")


def _tables(profile: Profile, choices: Sequence[Choice]) -> list[tuple[str, Table]]:
    return [
        ("Target: milliseconds of one forward", _times(profile.target)),
        (
            "Drafters: milliseconds of one forward of their models, and of the rest",
            _draft_times(profile),
        ),
        ("Acceptance by rank, with standard errors", _acceptance(profile)),
        ("Tokens per target pass, by nodes of the tree", _tokens(profile)),
        ("Best tree (Sequoia), behind 128 tokens", _choices(choices)),
    ]


def _table(*columns: str, left: int = 1) -> Table:
    table = Table(*columns)
    for column in table.columns[left:]:
        column.justify = "right"
    return table


def _times(curve: LatencyModel) -> Table:
    """One line per number of nodes, one column per context; rows beside each other at the end."""
    contexts = sorted({p.context for p in curve.points if p.rows == 1})
    table = _table("nodes", *(f"{context} before" for context in contexts), "x 1st", left=0)
    cells = {
        (p.rows, p.nodes, p.context): f"{p.ms:.2f} ({p.low:.2f} .. {p.high:.2f})"
        for p in curve.points
    }
    first = {p.context: p.ms for p in curve.points if p.rows == p.nodes == 1}
    base = contexts[0]
    for nodes in sorted({p.nodes for p in curve.points if p.rows == 1}):
        ratio = curve.ms([nodes], [base]) / first[base] if base in first else 1.0
        line = [cells.get((1, nodes, context), "") for context in contexts]
        table.add_row(str(nodes), *line, f"{ratio:.2f}")
    for rows in sorted({p.rows for p in curve.points if p.rows > 1}):
        for nodes in sorted({p.nodes for p in curve.points if p.rows == rows}):
            line = [cells.get((rows, nodes, context), "") for context in contexts]
            table.add_row(f"{rows} rows x {nodes}", *line, "")
    return table


def _draft_times(profile: Profile) -> Table:
    table = _table("drafter", "1 node", "2 nodes", "4 nodes", "8 nodes", "rest, a drafted node")
    for drafter in profile.drafters.values():
        curve = drafter.curve
        cells = [""] * 4
        if curve is not None:
            context = min(p.context for p in curve.points if p.rows == 1)
            cells = [f"{curve.ms([nodes], [context]):.2f}" for nodes in (1, 2, 4, 8)]
        table.add_row(drafter.name, *cells, f"{drafter.draft_ms:.3f}")
    return table


def _acceptance(profile: Profile) -> Table:
    ranks = [f"p{rank}" for rank in range(1, _SHOWN_RANKS + 1)]
    table = _table("drafter", "temperature", "measured", *ranks, "all", "positions", left=3)
    for drafter in profile.drafters.values():
        for at, ways in drafter.acceptance.items():
            for made in ways:
                pairs = list(zip(made.rates, made.stderr, strict=True))[:_SHOWN_RANKS]
                cells = [f"{rate:.2f}±{error:.2f}" for rate, error in pairs]
                cells += [""] * (_SHOWN_RANKS - len(cells))
                total = f"{sum(made.rates):.2f}"
                table.add_row(drafter.name, at, made.how, *cells, total, str(made.trials))
    return table


def _tokens(profile: Profile) -> Table:
    sizes = [str(size) for size in _SHOWN_SIZES]
    table = _table("drafter", "temperature", *sizes, left=2)
    for drafter in profile.drafters.values():
        for at, known in drafter.tokens_by_size.items():
            cells = [f"{known[n]:.2f}" if n in known else "" for n in _SHOWN_SIZES]
            table.add_row(drafter.name, at, *cells)
    return table


def _choices(choices: Sequence[Choice]) -> Table:
    table = _table(
        "drafter", "temperature", "nodes", "levels", "tokens/step", "tokens/s", "x plain", left=2
    )
    for made in choices:
        table.add_row(
            made.drafter,
            made.temperature,
            str(made.size),
            "" if made.levels is None else str(made.levels),
            f"{made.tokens:.2f}",
            f"{made.tokens_per_s:.1f}",
            f"{made.speedup:.2f}",
        )
    return table
