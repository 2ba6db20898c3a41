"""Tree decoding against plain decoding, token for token, on a real model.

    python benchmarks/exactness.py --prompts FILE.jsonl --num 100 --temperatures 0
    python benchmarks/exactness.py --prompts FILE.jsonl --num 50 --temperatures 0.8,1.0

Every prompt is answered by plain decoding, and by every drafter with a budget that goes round
1, 2, 4, 8, 16, 32, 64 and the planner's over the prompts. Above temperature 0 a seed is given:
coupled verification is used. Each difference is shown with its near-tie margin: by how much the
plain choice led.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import common

import redwood
from redwood.bench.report import first_difference
from redwood.planner.from_profile import make_planner
from redwood.sampling import SamplingParams

BUDGETS = (1, 2, 4, 8, 16, 32, 64, None)  # None: the planner's
NAMES = ("ngram", "shallow model", "union")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", default="smollm2-135m-instruct")
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--num", type=int, default=100)
    parser.add_argument("--low", type=int, default=80)
    parser.add_argument("--high", type=int, default=300)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--temperatures", default="0")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--layers", type=int, default=2, help="layers of the shallow drafter")
    parser.add_argument("--rows", type=int, default=8, help="prompts decoded together")
    parser.add_argument("--threads", type=int, help="of the native backend")
    parser.add_argument("--drafters", default=",".join(NAMES), help="which of them")
    parser.add_argument("--name", default="exactness")
    args = parser.parse_args()
    with common.shallow_copy(args.target, args.layers) as shallow:
        engine = redwood.load(
            args.target,
            f"{shallow}+ngram",
            dtype=args.dtype,
            max_rows=args.rows,
            budget=64,
            threads=args.threads,
        )
        union: Any = engine.drafter
        model, ngram = union.parts
        known = dict(zip(NAMES, (ngram, model, union), strict=True))
        drafters = {name: known[name] for name in args.drafters.split(",")}
        prompts = common.chat_prompts(engine, args.prompts, args.low, args.high, args.num)
        table = []
        for temperature in map(float, args.temperatures.split(",")):
            params = {"max_tokens": args.max_tokens, "temperature": temperature}
            if temperature > 0:
                params["seed"] = 1234
            engine.drafter, engine.budget, engine.planner = redwood.NoDrafter(), 1, None
            plain = engine.generate(prompts, **params)
            assert isinstance(plain, list)
            for name, drafter in drafters.items():
                engine.drafter = drafter
                start, differences, passes, tokens = time.time(), [], 0, 0
                planner = make_planner(engine.target, drafter)
                for offset, budget in enumerate(BUDGETS):
                    chosen = range(offset, len(prompts), len(BUDGETS))
                    engine.budget = budget or 1
                    engine.planner = None if budget else planner
                    outputs = engine.generate([prompts[i] for i in chosen], **params)
                    assert isinstance(outputs, list)
                    for i, output in zip(chosen, outputs, strict=True):
                        passes += output.stats.target_passes
                        tokens += output.stats.num_generated_tokens
                        found = first_difference(
                            engine,
                            prompts[i],
                            SamplingParams(**params),
                            plain[i].token_ids,
                            output.token_ids,
                            i,
                        )
                        if found is not None:
                            differences.append({"budget": budget, **asdict(found)})
                entry = {
                    "temperature": temperature,
                    "drafter": name,
                    "prompts": len(prompts),
                    "tokens": tokens,
                    "tokens_per_pass": round(tokens / passes, 3),
                    "differing_prompts": len(differences),
                    "differences": differences,
                }
                table.append(entry)
                print(entry, f"{time.time() - start:.0f} s", flush=True)
                setting = common.setting(
                    target=args.target,
                    dtype=args.dtype,
                    max_tokens=args.max_tokens,
                    backend=engine.target.name,
                )
                common.save(args.name, {"setting": setting, "results": table})


if __name__ == "__main__":
    main()
