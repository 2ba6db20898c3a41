"""What guessed nodes save a draft model: passes and drafting time per step, in turns.

A chain of three drafted tokens makes the same trees both times, so its ratio is that of drafting
alone. Planned: all drafters, arms and sizes as the planner likes. *Hits*: guessed nodes that
drafting came to. Temperature 0.

    python benchmarks/guesses.py --set editing --json out.json
"""

from __future__ import annotations

import argparse
from typing import Any

import common
from peers.prompts import add_options, chat_ids, read_prompts
from rich.console import Console
from rich.table import Table

import redwood
from redwood.bench.interleave import PLAIN, Candidate, alternate
from redwood.drafters.base import Drafter, ModelDrafter, NgramDrafter, UnionDrafter
from redwood.drafters.guesses import MOST_GUESSES
from redwood.engine.load import open_drafter
from redwood.planner.from_profile import make_planner
from redwood.sampling import SamplingParams

CHAIN = [-1, 0, 1, 2]
KINDS = ("chain", "chain, n-grams", "planned", "planned, n-grams")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", default="qwen2.5-coder-1.5b-instruct")
    parser.add_argument("--draft", default="qwen2.5-coder-0.5b-instruct")
    parser.add_argument("--temperature", type=float, default=0.0)
    add_options(parser, chosen="humaneval", limit=4, tokens=64)
    parser.add_argument("--kinds", nargs="*", choices=KINDS, default=KINDS)
    options = parser.parse_args()
    engine = redwood.load(options.target, backend="native", threads=options.threads, kv_cache=0)
    usual = open_drafter(options.draft, engine.tokenizer, backend="native", threads=options.threads)
    assert isinstance(usual, ModelDrafter)
    prompts = chat_ids(engine, read_prompts(options.set, options.prompts, options.limit))
    params = SamplingParams(max_tokens=options.max_tokens, temperature=options.temperature)

    def model(guesses: int, tree: list[int] | None = None) -> ModelDrafter:
        return ModelDrafter(usual.backend, tree, window=usual.window, guesses=guesses)

    candidates, models = [PLAIN], list[ModelDrafter]()
    for kind in options.kinds:
        for guesses in (0, MOST_GUESSES):
            chain = kind.startswith("chain")
            models.append(model(guesses, CHAIN if chain else None))
            drafter: Drafter = models[-1]
            if kind.endswith("n-grams"):
                drafter = UnionDrafter([models[-1], NgramDrafter()])
            planner = None if chain else make_planner(engine.target, drafter)
            budget = 2 * len(CHAIN) - 1 if kind == "chain, n-grams" else len(CHAIN)
            candidates.append(Candidate(f"{kind}, {guesses}", drafter, budget, planner))
    made = alternate(engine, candidates, prompts, params)
    plain = made[0]
    rows = list[dict[str, Any]]()
    for candidate, drafting, runs in zip(candidates[1:], models, made[1:], strict=True):
        stats = [each[0].stats for each in runs]
        passes = sum(each.target_passes for each in stats)
        guesser = drafting.guesser
        rows.append(
            {
                "drafter": candidate.name,
                "draft_ms": 1e3 * sum(each.seconds["draft"] for each in stats) / passes,
                "draft_passes": drafting.num_passes / passes,
                "guessed": guesser.num_guesses / max(1, drafting.num_passes),
                "hits": guesser.num_hits / max(1, guesser.num_guesses),
                "tokens": sum(each.num_generated_tokens for each in stats) / passes,
                "tokens_per_s": sum(each.num_generated_tokens for each in stats)
                / sum(each.decode_seconds for each in stats),
                "equal": sum(
                    each[0].token_ids == p[0].token_ids for each, p in zip(runs, plain, strict=True)
                ),
            }
        )
    for without, guessed in zip(rows[::2], rows[1::2], strict=True):
        guessed["ratio"] = guessed["draft_ms"] / max(1e-9, without["draft_ms"])
        guessed["speedup"] = guessed["tokens_per_s"] / without["tokens_per_s"]
    table = Table(title=f"{options.target}, {options.set}: per step, {len(prompts)} prompts")
    columns = ("draft_ms", "draft_passes", "guessed", "hits", "tokens", "tokens_per_s", "ratio")
    for column in ("drafter", *columns, "speedup", "equal"):
        table.add_column(column, justify="right" if table.columns else "left")
    for row in rows:
        cells = [f"{row[c]:.2f}" if c in row else "" for c in (*columns, "speedup")]
        table.add_row(row["drafter"], *cells, str(row["equal"]))
    Console(width=130).print(table)
    if options.json:
        setting = common.setting(target=options.target, draft=options.draft, set=options.set)
        common.write(options.json, setting, rows=rows)


if __name__ == "__main__":
    main()
