"""`redwood demo`: one answer through token trees beside plain decoding, in one process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

import typer

from redwood.cli import options as o
from redwood.cli.groups import Machine, grouped, values
from redwood.cli.loading import open_candidates
from redwood.cli.terminal import (
    NewText,
    painter,
    print_json,
    say,
    stats_table,
    stderr,
    stdout,
    write,
)

if TYPE_CHECKING:
    from redwood.bench.interleave import Run
    from redwood.bench.report import Report
    from redwood.engine.stats import Stats
    from redwood.engine.text import Engine

PROMPT = """\
Fix the spelling mistakes in this text, and write the whole text again:

The redwood is one of the tallest trees in the world. It grows along the cost of California, were \
fog from the ocean keeps the air cool and moist. A redwood can live for more than two thousand \
years. Its bark is thick and protects the tree from fire. Its cones are small, no longer than an \
inch, and its needles are short and flat. Many animals live in the redwood forest, from banana \
slugs on the ground to birds that nest high in the branches."""
"""An edit: most of the answer repeats the prompt, which suits n-gram drafts best."""


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command(
        epilog=o.examples(
            "redwood demo",
            "redwood demo --repeats 5 --budget 16",
            "redwood demo --target qwen2.5-coder-1.5b-instruct --json",
        )
    )(demo)


@grouped
def demo(
    *,
    target: o.Target = o.DEFAULT_TARGET,
    drafter: o.DrafterName = o.DEFAULT_DRAFTER,
    budget: o.Budget = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of the answer.")] = 160,
    repeats: Annotated[int, typer.Option(min=1, help="Answers of each kind.")] = 3,
    as_json: o.Json = False,
    machine: Machine,
) -> None:
    """Answers a sample prompt through token trees, then plainly, and compares speed and text.

    Both run in turns on the same loaded model; the table shows medians. What was drafted and
    accepted has another shade on a terminal.
    """
    engine, candidates = open_candidates(
        target,
        [drafter],
        [] if budget is None else [budget],
        **values(machine),
    )
    if len(candidates) < 2:
        raise o.wrong("--drafter", "none has nothing to compare with plain decoding")
    from redwood.bench.interleave import alternate, run
    from redwood.bench.report import reports
    from redwood.engine.tables import tables_of

    params = o.sampling({"max_tokens": max_tokens})
    prompt = _encode(engine)
    plain, drafted = candidates
    if not as_json:
        write(f"{PROMPT}\n\n{target} answers through token trees ({drafter}):\n\n")
    shown: list[str] = []
    paint = painter(engine.tokenizer, shaded=True)

    def show(step: NewText) -> None:
        shown.append(step.text)
        if not as_json:
            write(paint(step))

    run(engine, drafted, prompt, params, show)
    for part in tables_of([drafted.drafter]):  # they have seen the answer by now
        assert part.table is not None
        part.table.clear()
    if not as_json:
        write("\n\n")
    with stderr().status("Answering again, plainly and through trees in turns, to compare"):
        runs = alternate(engine, candidates, [prompt], params, repeats=repeats)
        report = reports(engine, candidates, [prompt], params, runs)[1]
    columns = {"token tree": _typical(runs[1][0]), "plain": _typical(runs[0][0])}
    if as_json:
        asked = {"target": target, "drafter": drafter, "repeats": repeats}
        print_json({**asked, "text": "".join(shown), **_as_value(engine, report, columns)})
    else:
        _show(engine, report, columns, repeats)
    if report.differences:
        found = report.differences[0]
        margin = "" if found.margin is None else f" (margin {found.margin:.3g})"
        say(f"error: the answers differ from token {found.position} on{margin}")
        raise typer.Exit(1)
    if not as_json:
        count = len(runs[0][0][0].token_ids)
        write(f"The answers are equal, all {count} tokens of them.\n")


def _as_value(engine: Engine, report: Report, columns: Mapping[str, Stats]) -> dict[str, Any]:
    return {
        "backend": engine.target.name,
        "identical": report.identical,
        "differences": [asdict(difference) for difference in report.differences],
        "ratio_to_plain": report.ratio_to_plain,
        "tree": columns["token tree"].to_dict(),
        "plain": columns["plain"].to_dict(),
    }


def _show(engine: Engine, report: Report, columns: Mapping[str, Stats], repeats: int) -> None:
    stdout().print(stats_table(columns))
    write(
        f"{report.ratio_to_plain:.2f} x plain decoding on the same {engine.target.name} "
        f"backend (medians of {repeats} each, in turns; prefill apart).\n"
        "Most of this answer repeats the prompt, which suits drafts from n-grams; for your own "
        "prompts, see redwood bench prompts.\n"
    )


def _encode(engine: Engine) -> list[int]:
    if not engine.tokenizer.chat_template:
        return engine.encode(PROMPT)
    return engine.encode([{"role": "user", "content": PROMPT}])


def _typical(runs: Sequence[Run]) -> Stats:
    """The counts of the first run, and the median seconds of all."""
    first = runs[0].stats
    seconds = {name: median(r.stats.seconds[name] for r in runs) for name in first.seconds}
    return replace(first, seconds=seconds)
