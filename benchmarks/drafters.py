"""Which drafters pay for a target: what each costs, how often it is right, and what it brings.

Beside n-grams and the draft model as it is by default: the model with all of its vocabulary, with
less of it, with its weights as they are in the file, reading whole prompts; and the target's own
first layers. Temperature 0, all in turns. *Right*: the target's next token is the drafter's first
choice, along plain texts. *Chain*: two drafted tokens at every step. *Planned*, for the usual ones:
sizes and arms as the planner likes, beginning with its quick look.

    python benchmarks/drafters.py --set humaneval --json out.json
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from statistics import median
from typing import Any

import common
from draft_window import hits
from peers.prompts import add_options, chat_ids, read_prompts
from rich.console import Console
from rich.table import Table

import redwood
from redwood.backends.native import load as native_load
from redwood.backends.native import packed as packed_files
from redwood.backends.native.backend import NativeBackend
from redwood.backends.native.weights import open_gguf
from redwood.bench.acceptance import Text
from redwood.bench.interleave import PLAIN, Candidate, alternate, run
from redwood.drafters.base import ModelDrafter, NgramDrafter, UnionDrafter
from redwood.engine.draft_vocab import DRAFT_VOCAB
from redwood.engine.load import DRAFT_WINDOW, open_drafter
from redwood.models import gguf_path
from redwood.planner.from_profile import make_planner
from redwood.profiling.measure import Kind, measure_curve
from redwood.sampling import SamplingParams

CHAIN = [-1, 0, 1]


def first_layers(target: str, layers: int, threads: int) -> NativeBackend:
    """The target's first layers with its norm and its output layer, as they are in its file."""
    file = gguf_path(target)
    if file is None:
        raise SystemExit(f"{target} is no GGUF file: --layers is for those")
    with open_gguf(file, None) as source:
        matrices = native_load._matrices(source, [file], "auto", threads, target)
        spec = source.spec
        if spec.tied:
            matrices["output"] = matrices["embed"]
        vectors = packed_files.vectors(source)
    left_out = tuple(f"{layer}." for layer in range(layers, spec.layers))
    return NativeBackend(
        replace(
            spec,
            layers=layers,
            windows=spec.windows[:layers],
            rope_of_layer=spec.rope_of_layer[:layers],
        ),
        {name: held for name, held in matrices.items() if not name.startswith(left_out)},
        {name: held for name, held in vectors.items() if not name.startswith(left_out)},
        capacity=spec.context,
        kv="f16",
        threads=threads,
        outputs=DRAFT_VOCAB,
    )


def drafters_of(options: argparse.Namespace, engine: redwood.Engine) -> dict[str, Any]:
    """Name -> model drafter, or None for n-grams."""

    def model(**how: Any) -> ModelDrafter:
        made = open_drafter(
            options.draft, engine.tokenizer, backend="native", threads=options.threads, **how
        )
        assert isinstance(made, ModelDrafter)
        return made

    made: dict[str, Any] = {
        "n-grams": None,
        f"{options.draft}, as by default": model(),
        "the same, whole prompts": model(draft_window=None),
        "the same, all of the vocabulary": model(draft_vocab=None),
        "the same, 16,384 tokens": model(draft_vocab=16384),
        "the same, weights as in the file": model(draft_weights="auto"),
    }
    for layers in options.layers:
        backend = first_layers(options.target, layers, options.threads)
        made[f"the target's first {layers} layers"] = ModelDrafter(backend, window=DRAFT_WINDOW)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", default="qwen2.5-coder-1.5b-instruct")
    parser.add_argument("--draft", default="qwen2.5-coder-0.5b-instruct")
    parser.add_argument("--layers", type=int, nargs="*", default=[4, 8, 14])
    add_options(parser, chosen="humaneval", limit=4, tokens=64)
    options = parser.parse_args()
    engine = redwood.load(options.target, backend="native", threads=options.threads, kv_cache=0)
    prompts = chat_ids(engine, read_prompts(options.set, options.prompts, options.limit))
    params = SamplingParams(max_tokens=options.max_tokens, temperature=0.0)
    texts = [Text(list(prompt), run(engine, PLAIN, prompt, params)[0]) for prompt in prompts]
    drafters = drafters_of(options, engine)

    def planned(name: str, drafter: Any) -> Candidate:
        return Candidate(name, drafter, 1, make_planner(engine.target, drafter))

    usual = next(known for known in drafters.values() if known is not None)
    candidates = [PLAIN]
    for name, known in drafters.items():
        if known is None:
            candidates += [Candidate(name, NgramDrafter(), 3), planned(name, NgramDrafter())]
            continue
        chain = ModelDrafter(known.backend, CHAIN, window=known.window)
        candidates.append(Candidate(name, chain, len(CHAIN)))
        if known is usual:
            candidates.append(planned(name, known))
    both = UnionDrafter([ModelDrafter(usual.backend, window=usual.window), NgramDrafter()])
    candidates.append(planned("both of these", both))
    made = alternate(engine, candidates, prompts, params)
    plain = [runs[0] for runs in made[0]]
    kind = Kind(1, 1, 128)
    plain_ms = measure_curve(engine.target, [kind], repeats=15, seconds=10.0).points[0].ms
    found: dict[str, dict[str, Any]] = {}
    for candidate, runs in zip(candidates[1:], made[1:], strict=True):
        row = found.setdefault(candidate.name, {"drafter": candidate.name})
        stats = [each[0].stats for each in runs]
        ratios = [s.tokens_per_s / p.stats.tokens_per_s for s, p in zip(stats, plain, strict=True)]
        kept = "planned" if candidate.planner else "chain"
        row[kept] = median(ratios)
        row[f"{kept}_per_pass"] = sum(s.num_generated_tokens for s in stats) / sum(
            s.target_passes for s in stats
        )
        row[f"{kept}_equal"] = sum(
            each[0].token_ids == p.token_ids for each, p in zip(runs, plain, strict=True)
        )
        known = drafters.get(candidate.name)
        if known is not None and "right" not in row:
            curve = measure_curve(known.backend, [kind], repeats=15, seconds=10.0)
            row["cost"] = curve.points[0].ms / plain_ms
            ranks = [rank for text in texts for rank in hits(known.backend, text, known.window)]
            row["right"] = ranks.count(0) / len(ranks)
    table = Table(title=f"{options.target}, {options.set}, temperature 0: decoding over plain")
    for column in ("drafter", "pass / plain", "right", "chain", "per pass", "planned", "per pass"):
        table.add_column(column, justify="right" if table.columns else "left")
    for row in found.values():
        keys = ("cost", "right", "chain", "chain_per_pass", "planned", "planned_per_pass")
        table.add_row(row["drafter"], *(f"{row[k]:.2f}" if k in row else "" for k in keys))
    Console(width=110).print(table)
    equal = sum(row.get(f"{k}_equal", 0) for row in found.values() for k in ("chain", "planned"))
    print(f"texts equal to plain decoding's: {equal} of {len(prompts) * (len(candidates) - 1)}")
    if options.json:
        setting = common.setting(target=options.target, draft=options.draft, set=options.set)
        common.write(options.json, setting, plain_ms=plain_ms, rows=list(found.values()))


if __name__ == "__main__":
    main()
