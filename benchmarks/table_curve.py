"""The curve of the successor table: tokens per pass against the tokens of answers it has seen.

The drafter answers prompts that are not measured, several at once, and learns. Whenever it has seen
one of the listed numbers of tokens, all measured prompts (Spec-Bench, temperature 0, one row, so
many nodes a pass) are answered, each from a copy of what it knew at that point: nothing of one
measured prompt helps another. A run goes on where the last one with the same result file stopped.

    python benchmarks/table_curve.py --prompts spec_bench_dev.jsonl --minutes 60 --json curve.json
    python benchmarks/table_curve.py --show curve.json --plot curve.png

What feeds: first all prompts there are (the same file, MT-Bench, HumanEval, edits, `calibrate`'s),
then questions about texts that come with Python: its reference, and docstrings of its modules.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

import common
import feeding
from peers.prompts import read_prompts

import redwood
from redwood.bench.interleave import Candidate, Stepper, run_interleaved
from redwood.bench.plot import check_plot
from redwood.bench.report import quartiles
from redwood.cli.loading import open_candidates
from redwood.sampling import SamplingParams

POINTS = (0, *(step * 10**power for power in (3, 4, 5) for step in (1, 2, 5)), 10**6)
_AT_ONCE = 16  # prompts between two looks at the clock


def measure(
    engine: redwood.Engine, candidate: Candidate, prompts: Sequence[list[int]], params: Any
) -> dict[str, Any]:
    """Tokens per pass over the prompts, each from what the drafter knows now; it learns nothing."""
    part = feeding.free_part(candidate.drafter)
    known, stepper, stats = feeding.state_of(part), Stepper(engine, candidate), list[Any]()
    for prompt in prompts:
        feeding.restore(part, known)
        run_interleaved([stepper], [prompt], params)
        stats += stepper.stats
    feeding.restore(part, known)
    tokens = sum(each.num_generated_tokens for each in stats)
    by_prompt = [each.mean_acceptance_length for each in stats]
    return {
        "tokens_per_pass": round(tokens / sum(each.target_passes for each in stats), 4),
        "quartiles": [round(value, 3) for value in quartiles(by_prompt)],
        "answer_tokens": tokens,
    }


def show(result: dict[str, Any], plot: Path | None) -> None:
    """Prints the curve, and draws it where a file is named."""
    points = result["points"]
    for point in points:
        print(f"{point['seen']:>9} {point['tokens_per_pass']:.3f}")
    if plot is None:
        return
    check_plot(plot)
    from matplotlib.figure import Figure

    figure: Any = Figure(figsize=(6.4, 4.2), layout="constrained")
    panel = figure.subplots()
    warm = [point for point in points if point["seen"] > 0]
    seen, tokens = ([point[name] for point in warm] for name in ("seen", "tokens_per_pass"))
    options = result["options"]
    panel.plot(seen, tokens, "o-", label=f"{options['drafter']}, {options['nodes']} nodes")
    for point in points:
        if point["seen"] == 0:
            label, at = "nothing seen before", point["tokens_per_pass"]
            panel.axhline(at, color="grey", linestyle="--", label=label)
    first_made = next((point["seen"] for point in points if point["asked_made"]), None)
    if first_made is not None:
        label = "from here on also questions about Python's texts"
        panel.axvline(first_made, color="grey", linestyle=":", label=label)
    panel.set_xscale("log")
    panel.set(xlabel="tokens of other answers seen", ylabel="tokens per target pass")
    panel.set_title(f"{options['target']}, Spec-Bench, {result['measured']} prompts", fontsize=10)
    panel.grid(alpha=0.3)
    panel.legend(fontsize=8)
    figure.savefig(plot, dpi=130)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", default="smollm2-135m-instruct")
    parser.add_argument("--drafter", default="ngram", help="with a free part, such as ngram")
    parser.add_argument("--prompts", type=Path, help="file of Spec-Bench")
    parser.add_argument("--limit", type=int, default=40, help="prompts that are measured")
    parser.add_argument("--nodes", type=int, default=8)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--points", type=int, nargs="+", default=POINTS, help="tokens seen")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="result; what was learned lies beside, as .npz")
    parser.add_argument("--show", type=Path, help="a result to print and draw, without a run")
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    if options.show is None and (options.prompts is None or options.json is None):
        parser.error("a run needs --prompts and --json")
    if options.plot is not None:
        check_plot(options.plot)
    return options


class Run:
    """A run that goes on: its result, and what was learned, in two files."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.end = options, time.monotonic() + 60.0 * options.minutes
        how: dict[str, Any] = {"backend": "native", "threads": options.threads}
        self.engine, found = open_candidates(
            options.target, [options.drafter], [options.nodes], **how
        )
        self.candidate = found[-1]
        self.part = feeding.free_part(self.candidate.drafter)
        tasks = read_prompts("specbench", options.prompts, options.limit)
        ids = [feeding.ids_of(self.engine, task.prompt, options.max_tokens) for task in tasks]
        self.prompts = [each for each in ids if each is not None]
        held = {task.prompt for task in tasks}
        sets = [t for t in feeding.set_prompts(options.prompts, []) if t not in held]
        made = (text for text in feeding.made_prompts() if text not in held)
        self.texts, self.of_sets = chain(sets, made), len(sets)
        self.params = SamplingParams(max_tokens=options.max_tokens)
        self.seen = self.asked = 0
        self.points: list[dict[str, Any]] = []
        self.state = options.json.with_suffix(".npz")
        if self.state.exists():
            self._go_on()

    def _go_on(self) -> None:
        saved, about = feeding.read_state(self.state, self.part)
        if about["of"] != self._of():
            raise SystemExit(f"{self.state} is of a run with other options: move it away")
        feeding.restore(self.part, saved)
        self.seen, self.asked = about["seen"], about["asked"]
        self.points = about["points"]
        for _ in islice(self.texts, self.asked):
            pass
        print(f"goes on after {self.seen} tokens of {self.asked} prompts", flush=True)

    def _of(self) -> list[Any]:
        given = self.options
        return [given.target, given.drafter, given.nodes, given.max_tokens, given.limit]

    def save(self) -> None:
        """Writes what was learned, then the result; both whole or as they were."""
        state = feeding.state_of(self.part)
        more = {"of": self._of(), "seen": self.seen, "asked": self.asked, "points": self.points}
        feeding.save_state(self.state, state, **more)
        about = common.setting(isa=getattr(self.engine.target, "isa", None))
        common.write(self.options.json, about, **self.result())

    def result(self) -> dict[str, Any]:
        table = getattr(self.part, "table", None)
        return {
            "options": vars(self.options),
            "measured": len(self.prompts),
            "fed": {"tokens": self.seen, "prompts": self.asked},
            "table": None if table is None else {"entries": len(table), "bytes": table.nbytes},
            "points": self.points,
        }

    def run(self) -> None:
        """Feeds and measures until the time is over, the points are, or the prompts are."""
        done = {point["at"] for point in self.points}
        for at in sorted(set(self.options.points) - done):
            while self.seen < at:
                some = list(islice(self.texts, _AT_ONCE))
                if not some or time.monotonic() > self.end:
                    self.save()
                    return
                ids = [feeding.ids_of(self.engine, each, self.options.max_tokens) for each in some]
                self.seen += feeding.feed(
                    self.engine, self.candidate.drafter, [each for each in ids if each], self.params
                )
                self.asked += len(some)
            found = measure(self.engine, self.candidate, self.prompts, self.params)
            made = max(0, self.asked - self.of_sets)
            point = {"at": at, "seen": self.seen, "asked": self.asked, "asked_made": made}
            self.points.append({**point, **found})
            print(self.points[-1], flush=True)
            self.save()


def main() -> None:
    options = arguments()
    if options.show is not None:
        show(json.loads(options.show.read_text()), options.plot)
        return
    run = Run(options)
    run.run()
    show(run.result(), options.plot)


if __name__ == "__main__":
    main()
