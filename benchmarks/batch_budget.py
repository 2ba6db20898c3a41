"""How many nodes a row should get as the batch grows: fixed sizes, SSSD's rule, the marginal rule.

    python benchmarks/batch_budget.py --answers smollm2 --flops-per-byte 153
    python benchmarks/batch_budget.py --answers smollm2 --measure qwen2.5-coder-1.5b-instruct
    python benchmarks/batch_budget.py --answers smollm2 \\
        --times benchmarks/results/native_steps_qwen2.5-coder-1.5b-instruct.json

No model runs: n-gram trees are replayed over recorded answers (replay.py), as many at once as the
batch has rows, and a step takes t(nodes of all rows). t is the ideal roofline max(1, n / I), or
measured here, or read from a file; past its end it goes on in a straight line. A tree counts with
the nodes that it has, often fewer than its budget; time to draft is left out for all.

Fixed: every row has the same budget. Published: `sssd.budget_by_batch` with I, or for a measured
curve with its knee, t(1) over the slope at its end. Marginal: trees of up to 32 nodes, and of all
rows together those nodes are scored whose chance is worth their time (`StepBudget.trim`), which is
what Redwood's planner does.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shlex
import sys
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import common
import numpy as np
from numpy.typing import NDArray
from replay import Answer, load_answers, start

from redwood.algorithms.sssd import budget_by_batch
from redwood.backends.load import open_model
from redwood.bench.report import forward_times
from redwood.drafters.base import NgramDrafter
from redwood.planner.budget import StepBudget

BATCHES = (1, 2, 4, 8, 16, 32, 64)
FIXED = (2, 4, 8, 16, 32)
MOST = 32


class Taken(NamedTuple):
    """One step of one row: nodes scored, tokens gained."""

    nodes: int
    tokens: int


class Curve(NamedTuple):
    """Time of a pass by its nodes, [n], n = 0 unused; and the roofline's knee."""

    times: NDArray[np.float64]
    knee: float


def curve_from(points: dict[int, float], knee: float | None, most: int) -> Curve:
    """A curve through points {nodes: time}, straight between them and past the last two."""
    sizes = sorted(points)
    slope = (points[sizes[-1]] - points[sizes[-2]]) / (sizes[-1] - sizes[-2])
    n = np.arange(most + 1)
    times = np.interp(n, sizes, [points[size] for size in sizes])
    times = np.where(n > sizes[-1], points[sizes[-1]] + slope * (n - sizes[-1]), times)
    return Curve(np.maximum.accumulate(times), knee or points[sizes[0]] / slope)


def fixed_steps(answers: Sequence[Answer], budget: int) -> list[list[Taken]]:
    """The steps of every answer with one budget; they do not depend on the batch."""
    drafter, found = NgramDrafter(), []
    for key, answer in enumerate(answers):
        replay, steps = start(answer, key, 1 << 20), list[Taken]()
        while replay.rest:
            (tree,) = drafter.propose([replay.context], [budget])
            steps.append(Taken(len(tree), replay.follow(tree)))
        drafter.release(key)
        found.append(steps)
    return found


def rate_of(steps: Sequence[Sequence[Taken]], batch: int, curve: Curve) -> tuple[float, float]:
    """Tokens per time, and tokens per row and step, while the batch is full."""
    waiting = deque(itertools.islice(itertools.cycle(steps), max(len(steps), 4 * batch)))
    rows = [deque(waiting.popleft()) for _ in range(batch)]
    tokens = count = 0
    spent = 0.0
    while True:
        taken = [row.popleft() for row in rows]
        tokens += sum(step.tokens for step in taken)
        spent += float(curve.times[sum(step.nodes for step in taken)])
        count += batch
        for i, row in enumerate(rows):
            if not row:
                if not waiting:
                    return tokens / spent, tokens / count
                rows[i] = deque(waiting.popleft())


def marginal_rate(
    answers: Sequence[Answer], batch: int, curve: Curve
) -> tuple[float, float, float]:
    """As `rate_of` by the marginal rule; and the nodes of a row, in the mean."""
    drafter = NgramDrafter()
    listed = itertools.islice(itertools.cycle(answers), max(len(answers), 4 * batch))
    waiting = deque(start(answer, key, 1 << 20) for key, answer in enumerate(listed))
    rows = [waiting.popleft() for _ in range(batch)]
    tokens = count = nodes = 0
    spent = 0.0
    while True:
        trees = drafter.propose([row.context for row in rows], [MOST] * batch)
        times = StepBudget(batch, curve.times[batch : batch * MOST + 1])
        trees = times.trim(trees, 0.0)
        tokens += sum(row.follow(tree) for row, tree in zip(rows, trees, strict=True))
        spent += float(curve.times[times.nodes])
        count, nodes = count + batch, nodes + times.nodes
        for i, row in enumerate(rows):
            if not row.rest:
                drafter.release(row.context.key)
                if not waiting:
                    return tokens / spent, tokens / count, nodes / count
                rows[i] = waiting.popleft()


def read_times(path: Path, context: int) -> dict[int, float]:
    """Milliseconds by nodes: {nodes: ms}, {"ms": {nodes: ms}}, or what native.py measured."""
    data = json.loads(path.read_text())
    if "steps" in data:
        steps = [step for step in data["steps"] if step["context"] == context]
        return {step["nodes"]: step["redwood_ms"] for step in steps}
    return {int(size): float(ms) for size, ms in data.get("ms", data).items()}


def read_curve(options: argparse.Namespace) -> tuple[str, Curve]:
    """The curve that the options ask for, and what to call it."""
    most = max(BATCHES) * MOST
    if options.measure:
        _, backend = open_model(options.measure, backend="native", threads=options.threads)
        sizes = [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64, 128, 256]
        ms = forward_times(backend, sizes, context=options.context, repeats=options.repeats).ms
        return f"measured: {options.measure}", curve_from(ms, None, most)
    if options.times:
        points = read_times(options.times, options.context)
        return options.times.name, curve_from(points, None, most)
    knee = options.flops_per_byte
    times = np.maximum(1.0, np.arange(most + 1) / knee)
    return f"roofline: {knee:g} flops per byte", Curve(times, knee)


def compare(answers: Sequence[Answer], curve: Curve) -> list[dict[str, Any]]:
    """A row for every batch: times plain decoding for every rule."""
    steps: dict[int, list[list[Taken]]] = {}
    made = []
    for batch in BATCHES:
        published = budget_by_batch(batch, curve.knee)
        row: dict[str, Any] = {"batch": batch, "published_budget": published}
        plain = batch / float(curve.times[batch])
        speedups = {}
        for size in (*FIXED, published):
            if size == 1:
                speedups[size] = 1.0
                continue
            if size not in steps:
                steps[size] = fixed_steps(answers, size)
            speedups[size] = rate_of(steps[size], batch, curve)[0] / plain
        row["fixed"] = {size: round(speedups[size], 3) for size in FIXED}
        row["published"] = round(speedups[published], 3)
        rate, tokens, nodes = marginal_rate(answers, batch, curve)
        row["marginal"] = round(rate / plain, 3)
        row |= {"marginal_tokens": round(tokens, 3), "marginal_nodes": round(nodes, 2)}
        made.append(row)
        print(row, flush=True)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--answers", default="smollm2", help="record that is replayed")
    parser.add_argument("--flops-per-byte", type=float, default=153.0, help="an A100's: 153")
    parser.add_argument("--times", type=Path, help="JSON of {nodes: ms}, or of native.py")
    parser.add_argument("--measure", metavar="TARGET", help="measure t on the native backend")
    parser.add_argument("--context", type=int, default=128, help="tokens before a measured pass")
    parser.add_argument("--repeats", type=int, default=7, help="of measured passes")
    parser.add_argument("--threads", type=int, help="of measured passes; default: all")
    parser.add_argument("--only-measure", action="store_true", help="write the times and end")
    parser.add_argument("--result", default="batch_budget")
    options = parser.parse_args()
    name, curve = read_curve(options)
    command = shlex.join(["python", "benchmarks/batch_budget.py", *sys.argv[1:]])
    result: dict[str, Any] = {"setting": common.setting(command=command), "curve": name}
    listed = [n for n in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64, 128, 256) if n < len(curve.times)]
    result["ms"] = {n: round(float(curve.times[n]), 4) for n in listed}
    result["knee"] = round(curve.knee, 1)
    if not options.only_measure:
        answers = [each for each in load_answers(options.answers) if len(each.answer) > 1]
        result |= {"prompts": len(answers), "results": compare(answers, curve)}
    common.save(options.result, result)


if __name__ == "__main__":
    main()
