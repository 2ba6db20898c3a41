"""Which tokens should a draft model score: the first ids, or those that the target says most?

Coverage: the share of the tokens of the target's own answers that a list holds. Then, for some
lists, what they cost and bring: the time of a pass of the draft model; *right*, how often the
target's next token is its first choice along these answers; and chains of two drafted tokens
(--planned: the planner's own trees, too), decoded in turns at temperature 0 beside plain decoding.
The table must come from other prompts:

    redwood table create said.table --prompts others.jsonl --target qwen2.5-coder-1.5b-instruct
    python benchmarks/draft_vocab.py --table said.table --set mtbench --json out.json
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import median
from typing import Any

import common
import numpy as np
from draft_window import hits
from peers.prompts import add_options, chat_ids, read_prompts
from rich.console import Console
from rich.table import Table

import redwood
from redwood.bench.acceptance import Text
from redwood.bench.interleave import PLAIN, Candidate, alternate, run
from redwood.drafters.base import ModelDrafter
from redwood.engine.draft_vocab import DRAFT_VOCAB, special_ids
from redwood.engine.load import open_drafter
from redwood.planner.from_profile import make_planner
from redwood.profiling.measure import Kind, measure_curve
from redwood.sampling import SamplingParams
from redwood.table import read_table
from redwood.table.ranking import rank_tokens, ranked_ids

CHAIN = [-1, 0, 1]
SIZES = (8192, 16384, 32768, 49152)


def coverage(options: argparse.Namespace, engine: Any, texts: list[Text]) -> dict[str, Any]:
    """Share of the answers' tokens in each list, by its size."""
    info, entries = read_table(options.table)
    ranking, always = rank_tokens(entries), special_ids(engine.tokenizer)
    said = np.array([token for text in texts for token in text.answer])
    rows = []
    for size in SIZES:
        ranked = ranked_ids(ranking, size, [*always, *engine.eos_ids])
        some = ranked_ids(ranking[:0], size, [*always, *engine.eos_ids])
        rows.append(
            {
                "size": size,
                "first": float((said < size).mean()),
                "first_and_special": float(np.isin(said, some).mean()),
                "ranked": float(np.isin(said, ranked).mean()),
            }
        )
    in_table = float(np.isin(said, ranking).mean())
    about = {"rows": info.rows, "ranked_tokens": len(ranking), "in_table": in_table}
    return {**about, "answer_tokens": len(said), "lists": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", default="qwen2.5-coder-1.5b-instruct")
    parser.add_argument("--draft", default="qwen2.5-coder-0.5b-instruct")
    parser.add_argument("--table", type=Path, required=True)
    parser.add_argument("--ranked", type=int, nargs="*", default=[16384, 32768, 49152])
    parser.add_argument("--first", type=int, nargs="*", default=[16384, DRAFT_VOCAB])
    parser.add_argument("--no-time", action="store_true", help="coverage and hits alone")
    parser.add_argument("--planned", action="store_true", help="the planner's own trees, too")
    add_options(parser, chosen="mtbench", limit=8, tokens=96)
    options = parser.parse_args()
    engine = redwood.load(options.target, None, backend="native", threads=options.threads)
    prompts = chat_ids(engine, read_prompts(options.set, options.prompts, options.limit))
    params = SamplingParams(max_tokens=options.max_tokens, temperature=0.0)
    texts = [Text(list(prompt), run(engine, PLAIN, prompt, params)[0]) for prompt in prompts]
    found: dict[str, Any] = {"coverage": coverage(options, engine, texts)}
    table = Table(title=f"{options.set}: share of {found['coverage']['answer_tokens']} tokens said")
    for column in ("size", "first ids", "first and special", "ranked"):
        table.add_column(column, justify="right")
    for row in found["coverage"]["lists"]:
        keys = ("first", "first_and_special", "ranked")
        table.add_row(f"{row['size']:,}", *(f"{row[key]:.4f}" for key in keys))
    Console(width=100).print(table)

    named = {f"first {size:,}": size for size in options.first}
    named |= {f"ranked {size:,}": f"{options.table}:{size}" for size in options.ranked}
    made: dict[str, ModelDrafter] = {}
    for name, vocab in named.items():
        drafter = open_drafter(
            options.draft,
            engine.tokenizer,
            draft_vocab=vocab,
            ends=engine.eos_ids,
            backend="native",
            threads=options.threads,
        )
        assert isinstance(drafter, ModelDrafter)
        made[name] = drafter
    rows: dict[str, dict[str, Any]] = {name: {"vocabulary": name} for name in made}
    for name, drafter in made.items():
        ranks = [rank for text in texts for rank in hits(drafter.backend, text, drafter.window)]
        rows[name]["right"] = ranks.count(0) / len(ranks)
    if not options.no_time:
        _timed(engine, made, rows, prompts, params, options.planned)
    table = Table(title=f"{options.target}, {options.set}, temperature 0")
    keys = ("pass_ms", "right", "chain", "chain_per_pass", "chain_draft_ms", "planned")
    for column in ("tokens scored", *(key.replace("_", " ") for key in keys)):
        table.add_column(column, justify="right" if table.columns else "left")
    for row in rows.values():
        shown = (f"{row[key]:.3f}" if key in row else "" for key in keys)
        table.add_row(row["vocabulary"], *shown)
    Console(width=110).print(table)
    if options.json:
        setting = common.setting(target=options.target, draft=options.draft, set=options.set)
        common.write(options.json, setting, **found, rows=list(rows.values()))


def _timed(
    engine: Any,
    made: dict[str, ModelDrafter],
    rows: dict[str, dict[str, Any]],
    prompts: list[Any],
    params: SamplingParams,
    planned: bool,
) -> None:
    """Times of passes, and decoding in turns."""
    kind = Kind(1, 1, 128)
    for _ in range(3):  # in turns: the machine may change meanwhile
        for name, drafter in made.items():
            curve = measure_curve(drafter.backend, [kind], repeats=15, seconds=5.0)
            rows[name].setdefault("passes_ms", []).append(curve.points[0].ms)
    candidates = [PLAIN]
    for name, drafter in made.items():
        chain = ModelDrafter(drafter.backend, CHAIN, window=drafter.window)
        candidates.append(Candidate(name, chain, len(CHAIN)))
        if planned:
            own = ModelDrafter(drafter.backend, window=drafter.window)
            candidates.append(Candidate(name, own, 1, make_planner(engine.target, own)))
    runs = alternate(engine, candidates, prompts, params)
    plain = [each[0] for each in runs[0]]
    equal = 0
    for candidate, made_by in zip(candidates[1:], runs[1:], strict=True):
        row, stats = rows[candidate.name], [each[0].stats for each in made_by]
        pairs = list(zip(stats, plain, strict=True))
        kept = "planned" if candidate.planner else "chain"
        row[kept] = median(s.tokens_per_s / p.stats.tokens_per_s for s, p in pairs)
        passes = sum(s.target_passes for s in stats)
        row[f"{kept}_per_pass"] = sum(s.num_generated_tokens for s in stats) / passes
        row[f"{kept}_draft_ms"] = 1e3 * sum(s.seconds.get("draft", 0.0) for s in stats) / passes
        same = [e[0].token_ids == p.token_ids for e, p in zip(made_by, plain, strict=True)]
        row[f"{kept}_equal"] = sum(same)
        equal += sum(same)
    for row in rows.values():
        row["pass_ms"] = median(row["passes_ms"])
    print(f"texts equal to plain decoding's: {equal} of {len(prompts) * (len(candidates) - 1)}")


if __name__ == "__main__":
    main()
