"""Pictures of results. Matplotlib is optional: without it the numbers are saved and no picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import common


class Curve(NamedTuple):
    """One line of a panel; `measured` shows points with error bars and no line."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    errors: Sequence[float] | None = None
    measured: bool = False
    color: int = 0


class Panel(NamedTuple):
    """One picture beside others."""

    title: str
    x_label: str
    y_label: str
    curves: Sequence[Curve]
    log_x: bool = False


def save_panels(name: str, panels: Sequence[Panel]) -> None:
    """Writes benchmarks/results/NAME.png."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        print("no picture: pip install matplotlib")
        return
    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(4.6 * len(panels) + 0.6, 4.2), squeeze=False
    )
    for axis, panel in zip(axes[0], panels, strict=True):
        for curve in panel.curves:
            style = {"color": f"C{curve.color}", "label": curve.label, "markersize": 4}
            if curve.measured:
                axis.errorbar(curve.x, curve.y, curve.errors, fmt="o", capsize=2, **style)
            else:
                axis.plot(curve.x, curve.y, **style)
        if panel.log_x:
            axis.set_xscale("log", base=2)
        axis.set(title=panel.title, xlabel=panel.x_label, ylabel=panel.y_label)
        axis.grid(alpha=0.3)
    axes[0][-1].legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.01, 1.0))
    figure.tight_layout()
    figure.savefig(common.RESULTS / f"{name}.png", dpi=100, bbox_inches="tight")
    pyplot.close(figure)
