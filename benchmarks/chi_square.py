"""Does sampling through trees follow the target's law? A chi-square test on a real model.

    python benchmarks/chi_square.py --samples 3000

No seed is given, so traversal verification draws fresh chance for every sample. At three positions
of a text the next token is drawn many times through a tree and counted against the target's own
probabilities; then the second token, given the most frequent first one. The total variation that
the test would have seen with power 0.99 at level 0.001 is printed beside each p-value.
"""

from __future__ import annotations

import argparse
import math
from collections import Counter
from typing import Any

import common
import numpy as np
from scipy import optimize, stats

import redwood
from redwood.backends.base import Nodes
from redwood.sampling import History, SamplingParams, probs_from_scores, scores

TEXT = (
    "The harbour was quiet in the early morning. A fisherman mended his nets while gulls circled "
    "over the boats, and from the bakery on the corner came the smell of fresh bread. Nobody "
    "expected what the tide would bring that day, least of all the keeper of the lighthouse, who"
)


def law(engine: redwood.Engine, text: list[int], params: SamplingParams) -> Any:
    """The target's probabilities after `text`, by one plain forward."""
    row = engine.target.open()
    (logits,) = engine.target.extend([Nodes(row, text, num_logits=1)])
    engine.target.release(row)
    return probs_from_scores(scores(logits[0], params, History(text)), params).numpy()


def seen_variation(cells: int, samples: int) -> float:
    """Smallest total variation found with power 0.99 at level 0.001; 4 N TV^2 bounds the effect."""
    freedom = max(1, cells - 1)
    border = stats.chi2.isf(0.001, freedom)
    effect = optimize.brentq(lambda x: stats.ncx2.sf(border, freedom, x) - 0.99, 1e-6, 1e4)
    return math.sqrt(float(effect) / (4 * samples))


def compare(counts: Counter[int], probs: Any) -> tuple[float, int, float]:
    """p-value, cells (the rare ones pooled) and detectable total variation."""
    samples = sum(counts.values())
    impossible = sum(n for token, n in counts.items() if probs[token] == 0)
    big = np.flatnonzero(probs * samples >= 10)
    seen = [counts[int(t)] for t in big]
    want = [float(probs[t]) * samples for t in big]
    rest = samples - sum(want)
    if rest > 1e-6:
        seen.append(samples - sum(seen))
        want.append(rest)
    if len(want) == 1:  # one token has it all: nothing to compare
        return float(not impossible), 1, seen_variation(2, samples)
    value = 0.0 if impossible else float(stats.chisquare(seen, want, sum_check=False).pvalue)
    return value, len(want), seen_variation(len(want), samples)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", default="smollm2-135m-instruct")
    parser.add_argument("--samples", type=int, default=3000)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--noise", type=float, default=0.0, help="on the drafter's weights")
    parser.add_argument("--settings", default="1:1,0.6:0.9", help="temperature:top-p, ...")
    parser.add_argument("--name", default="chi_square")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--verifier", default="traversal")
    args = parser.parse_args()
    table = []
    with common.shallow_copy(args.target, args.layers, args.noise) as shallow:
        engine = redwood.load(args.target, shallow, tree=[-1, 0, 0, 1, 1, 2, 3], max_rows=args.rows)
        whole = engine.encode(TEXT)
        for setting in args.settings.split(","):
            temperature, top_p = map(float, setting.split(":"))
            params = SamplingParams(
                max_tokens=2, temperature=temperature, top_p=top_p, verifier=args.verifier
            )
            for position in (4, 8, 12):
                prompt = whole[:position]
                first: Counter[int] = Counter()
                second: dict[int, Counter[int]] = {}
                passes = 0
                outputs = engine.generate(
                    [prompt] * args.samples,
                    max_tokens=2,
                    temperature=temperature,
                    top_p=top_p,
                    verifier=args.verifier,
                    ignore_eos=True,
                )
                assert isinstance(outputs, list)
                for output in outputs:
                    a, b = output.token_ids
                    first[a] += 1
                    second.setdefault(a, Counter())[b] += 1
                    passes += output.stats.target_passes
                top = first.most_common(1)[0][0]
                tests = {
                    "first token": compare(first, law(engine, prompt, params)),
                    "second, given the top first": compare(
                        second[top], law(engine, [*prompt, top], params)
                    ),
                }
                for name, (value, cells, variation) in tests.items():
                    entry = {
                        "temperature": temperature,
                        "top_p": top_p,
                        "position": position,
                        "test": name,
                        "samples": args.samples if name == "first token" else first[top],
                        "cells": cells,
                        "p_value": round(value, 4),
                        "tv_it_could_see": round(variation, 3),
                        "tokens_per_pass": round(2 * args.samples / passes, 2),
                    }
                    table.append(entry)
                    print(entry, flush=True)
        common.save(
            args.name,
            {"setting": common.setting(target=args.target, noise=args.noise), "results": table},
        )


if __name__ == "__main__":
    main()
