"""Tables of results, for reading; the numbers are in the result file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

_CONSOLE = Console(width=120)


def part(name: str, subject: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Prints the table of one part."""
    {"exact": _exact, "curve": _curve, "table": _speeds, "plan": _plan}[name](subject, rows)


def _print(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    made = Table(title=title)
    for column in columns:
        made.add_column(column, justify="right")
    for row in rows:
        made.add_row(*(str(cell) for cell in row))
    _CONSOLE.print(made)


def _exact(subject: str, rows: Sequence[Mapping[str, Any]]) -> None:
    _print(
        f"{subject}: logits, difference in units of their spread",
        ("backend", "probe", "largest", "passed"),
        [
            (r["backend"], r["probe"], f"{r['worst']:.2g}", "yes" if r["passed"] else "NO")
            for r in rows
            if "probe" in r
        ],
    )
    _print(
        f"{subject}: answers against plain decoding on the same backend",
        ("backend", "temp.", "drafter", "nodes", "tokens", "per pass", "differ", "near ties"),
        [
            (
                r["backend"],
                r["temperature"],
                r["drafter"],
                r["budget"],
                r["tokens"],
                f"{r['tokens_per_pass']:.2f}",
                f"{r['differing_prompts']} of {r['prompts']}",
                r["near_ties"],
            )
            for r in rows
            if "probe" not in r
        ],
    )


def _curve(subject: str, rows: Sequence[Mapping[str, Any]]) -> None:
    _print(
        f"{subject}: ms of one forward by nodes",
        ("nodes", *(f"{r['backend']}, context {r['context']}" for r in rows)),
        [(n, *(f"{r['ms'][n]:.2f}" for r in rows)) for n in rows[0]["ms"]],
    )


def _speeds(subject: str, rows: Sequence[Mapping[str, Any]]) -> None:
    _print(
        f"{subject}: tokens/s, medians over prompts (quartiles); prefill apart",
        ("temp.", "way", "nodes", "tokens/s", "over plain graphs", "over HF", "per pass", "ms"),
        [
            (
                r["temperature"],
                r["way"],
                r["budget"] or "",
                "{:.0f} ({:.0f}, {:.0f})".format(r["tokens_per_s"], *r["tokens_per_s_quartiles"]),
                f"{r['over_plain_graphs']:.2f}",
                f"{r['over_hf_generate']:.2f}",
                f"{r['tokens_per_pass']:.2f}" if r["tokens_per_pass"] else "",
                _stages(r["ms_per_pass"]),
            )
            for r in rows
        ],
    )


def _stages(ms: Mapping[str, float] | None) -> str:
    return " ".join(f"{stage} {value:.1f}" for stage, value in (ms or {}).items())


def _plan(subject: str, rows: Sequence[Mapping[str, Any]]) -> None:
    _print(
        f"{subject}: the planner's tree for the model drafter",
        ("temp.", "nodes", "levels", "what", "predicted", "measured"),
        [
            (r["temperature"], r["size"], r["levels"], what, f"{r[p]:.2f}", f"{r[m]:.2f}")
            for r in rows
            for what, p, m in (
                ("tokens per pass", "predicted_tokens_per_pass", "measured_tokens_per_pass"),
                ("tokens/s", "predicted_tokens_per_s", "measured_tokens_per_s"),
                ("over plain", "predicted_over_plain", "measured_over_plain"),
            )
        ],
    )
