"""The figure of a profile: latency, tokens per step, predicted speed. Needs Matplotlib."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from redwood.algorithms.sequoia import expected_tokens, optimal_tree
from redwood.bench.choice import MOST_NODES, Choice, choices, speeds, step_times
from redwood.bench.curves import CONTEXT
from redwood.bench.decoding import MOST_LEVELS
from redwood.errors import ArgumentError, UnsupportedError
from redwood.profiling.profile import DrafterProfile, Profile

FORMATS = (".png", ".svg", ".pdf")
_SIZES = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 24, 32, 48, 64)
_LEVELS = tuple(range(2, 13))
_WIDE, _HIGH = 5.2, 3.9  # inches of a panel

_Tables = dict[tuple[str, str], list[list[float]]]


def check_plot(path: Path) -> None:
    """Raises what `plot` would raise for any profile, before hours of measuring.

    Raises:
        ArgumentError: a file of another kind than `FORMATS`.
        UnsupportedError: no Matplotlib.
    """
    if path.suffix.lower() not in FORMATS:
        raise ArgumentError(f"the plot {path} must end with one of {', '.join(FORMATS)}")
    if find_spec("matplotlib") is None:
        raise UnsupportedError("plots need Matplotlib: pip install 'redwood[plot]'")


def plot(profile: Profile, path: Path, title: str = "") -> None:
    """Draws a profile: three panels for all drafters, and a heat map per model and temperature.

    Raises:
        ArgumentError: a file of another kind, or one that cannot be written.
        UnsupportedError: no Matplotlib.
    """
    check_plot(path)
    from matplotlib.figure import Figure

    maps = [(d.name, at) for d in profile.drafters.values() for at in d.acceptance]
    rows = 1 + -(-len(maps) // 3)
    figure: Any = Figure(figsize=(3 * _WIDE, rows * _HIGH), layout="constrained")
    panels = figure.subplots(rows, 3, squeeze=False).flatten().tolist()
    _draw_times(panels[0], profile)
    _draw_tokens(panels[1], profile)
    tables = {
        (name, at): speeds(profile, name, float(at), _SIZES[1:], _LEVELS) for name, at in maps
    }
    best = {(made.drafter, made.temperature): made for made in choices(profile)}
    _draw_speed(panels[2], profile, tables)
    for panel, named in zip(panels[3:], maps, strict=False):
        _draw_map(figure, panel, tables[named], best[named])
    for panel in panels[3 + len(maps) :]:
        panel.set_axis_off()
    figure.suptitle(title or profile.key.target)
    try:
        figure.savefig(path, dpi=130)
    except OSError as error:
        raise ArgumentError(f"cannot write {path}: {error.strerror or error}") from error


def _draw_times(panel: Any, profile: Profile) -> None:
    contexts = sorted({p.context for p in profile.target.points if p.rows == 1})
    for number, context in enumerate(contexts):
        points = [p for p in profile.target.points if (p.rows, p.context) == (1, context)]
        spread = [[p.ms - p.low for p in points], [p.high - p.ms for p in points]]
        nodes, ms = [p.nodes for p in points], [p.ms for p in points]
        colour = f"C{number}"
        panel.errorbar(
            nodes, ms, [[max(0.0, e) for e in side] for side in spread], fmt="o", ms=3, color=colour
        )
        times = profile.target.times(context, MOST_NODES)[1:]
        panel.plot(range(1, MOST_NODES + 1), times, color=colour, label=f"target, {context} before")
    for number, drafter in enumerate(profile.drafters.values(), start=len(contexts)):
        if drafter.curve is not None:
            points = [p for p in drafter.curve.points if p.rows == 1]
            context = min(p.context for p in points)
            most = max(p.nodes for p in points)
            times = drafter.curve.times(context, most)[1:]
            label = f"{drafter.name}, {context} before"
            panel.plot(range(1, most + 1), times, "--", color=f"C{number}", label=label)
    panel.set(title="One forward", xlabel="nodes", ylabel="ms", ylim=(0, None))
    panel.legend(fontsize="small")


def _draw_tokens(panel: Any, profile: Profile) -> None:
    for number, (drafter, at) in enumerate(_measured(profile)):
        colour, known = f"C{number}", drafter.tokens_by_size.get(at, {})
        label = f"{drafter.name}, temperature {at}"
        if at in drafter.acceptance:
            panel.plot(_SIZES, _expected(drafter, at), color=colour, label=label)
            panel.plot(list(known), list(known.values()), "x", color=colour)
        else:
            panel.plot(list(known), list(known.values()), "x-", color=colour, label=label)
    _by_size(panel, "Tokens per step (crosses: measured)", "tokens per target pass")


def _draw_speed(panel: Any, profile: Profile, tables: _Tables) -> None:
    for number, (drafter, at) in enumerate(_measured(profile)):
        label = f"{drafter.name}, temperature {at}"
        if at in drafter.acceptance:
            columns = zip(*tables[drafter.name, at], strict=True)
            best = [max(value for value in column if value == value) for column in columns]
            panel.plot(_SIZES, [1.0, *best], color=f"C{number}", label=label)
        else:
            times = step_times(profile, drafter.name)
            known = {n: t for n, t in drafter.tokens_by_size[at].items() if n in times}
            values = [tokens * times[1] / times[size] for size, tokens in known.items()]
            panel.plot(list(known), values, color=f"C{number}", label=label)
    panel.axhline(1.0, color="grey", linewidth=0.8)
    _by_size(panel, f"Predicted speed, {CONTEXT} tokens before", "x plain decoding")


def _draw_map(figure: Any, panel: Any, table: list[list[float]], best: Choice) -> None:
    sizes = _SIZES[1:]
    image = panel.imshow(table, origin="lower", aspect="auto")
    figure.colorbar(image, ax=panel, label="x plain decoding")
    panel.set_xticks(range(len(sizes)), sizes)
    panel.set_yticks(range(len(_LEVELS)), _LEVELS)
    tree = "no tree pays" if best.size == 1 else f"{best.size} nodes, {best.levels} levels"
    title = f"{best.drafter}, temperature {best.temperature}: {tree}"
    panel.set(title=title, xlabel="nodes of the tree", ylabel="levels")
    if best.size > 1 and best.levels is not None:
        x = min(range(len(sizes)), key=lambda i: abs(sizes[i] - best.size))
        panel.plot([x], [min(best.levels, _LEVELS[-1]) - _LEVELS[0]], "*", color="red", ms=14)


def _by_size(panel: Any, title: str, ylabel: str) -> None:
    panel.set_xscale("log", base=2)
    panel.set_xticks(_SIZES, [str(n) if n in (1, 2, 4, 8, 16, 32, 64) else "" for n in _SIZES])
    panel.minorticks_off()
    panel.set(title=title, xlabel="nodes of the tree", ylabel=ylabel)
    panel.grid(alpha=0.3)
    if panel.get_legend_handles_labels()[0]:
        panel.legend(fontsize="small")


def _measured(profile: Profile) -> Iterator[tuple[DrafterProfile, str]]:
    for drafter in profile.drafters.values():
        for at in sorted({*drafter.acceptance, *drafter.tokens_by_size}, key=float):
            yield drafter, at


def _expected(drafter: DrafterProfile, at: str) -> list[float]:
    """By `_SIZES`, for trees as deep as those that were decoded with."""
    rates = drafter.acceptance[at][0].rates
    trees = (optimal_tree(rates, size, max_levels=MOST_LEVELS) for size in _SIZES[1:])
    return [1.0, *(expected_tokens(tree, rates) for tree in trees)]
