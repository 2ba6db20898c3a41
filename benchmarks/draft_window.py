"""How much of a prompt must a draft model read? Its hits along plain answers, by window.

At temperature 0. A window of W keeps the first four tokens of a prompt and its last W; what the
answer adds is read as it comes. A hit of rank k: the target's token is the draft's k-th best.

    python benchmarks/draft_window.py --target qwen2.5-coder-1.5b-instruct \\
        --draft qwen2.5-coder-0.5b-instruct --set humaneval --json out.json
"""

from __future__ import annotations

import argparse
from contextlib import closing
from typing import Any

import common
from peers.prompts import add_options, chat_ids, read_prompts
from rich.console import Console
from rich.table import Table

from redwood.bench.acceptance import Text, paired
from redwood.bench.interleave import PLAIN, run
from redwood.cli.loading import open_candidates
from redwood.drafters.base import ModelDrafter
from redwood.sampling import SamplingParams, top

RANKS = 3


def hits(draft: Any, text: Text, window: int | None) -> list[int]:
    """Rank of each token of the answer among the draft's best, RANKS if it is not there."""
    reads = ModelDrafter(draft, window=window).reads(len(text.prompt))
    skipped = len(text.prompt) - reads
    prompt = text.prompt if not skipped else text.prompt[:4] + text.prompt[4 + skipped :]
    found = []
    # Paired with itself: the texts are plain decoding's, so the target need not be asked again.
    with closing(paired(draft, draft, Text(prompt, text.answer))) as pairs:
        for token, (_, logits) in zip(text.answer, pairs, strict=False):
            best = top(logits[None], RANKS)[1][0].tolist()
            found.append(best.index(token) if token in best else RANKS)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", default="qwen2.5-coder-1.5b-instruct")
    parser.add_argument("--draft", default="qwen2.5-coder-0.5b-instruct")
    add_options(parser, chosen="humaneval", limit=6, tokens=96)
    parser.add_argument("--windows", type=int, nargs="+", default=[256, 128, 64, 32, 16])
    options = parser.parse_args()
    how = {"backend": "native", "threads": options.threads}
    engine, opened = open_candidates(options.target, [options.draft], [], **how)
    drafter = opened[-1].drafter
    assert isinstance(drafter, ModelDrafter)
    prompts = chat_ids(engine, read_prompts(options.set, options.prompts, options.limit))
    params = SamplingParams(max_tokens=options.max_tokens, temperature=0.0)
    texts = [Text(list(prompt), run(engine, PLAIN, prompt, params)[0]) for prompt in prompts]
    lengths = [len(prompt) for prompt in prompts]
    table = Table(title=f"{options.set}, prompts of {min(lengths)} to {max(lengths)} tokens")
    for column in ("window", *(f"rank {k + 1}" for k in range(RANKS))):
        table.add_column(column, justify="right")
    rows = []
    for window in (None, *options.windows):
        found = [rank for text in texts for rank in hits(drafter.backend, text, window)]
        rates = [found.count(rank) / len(found) for rank in range(RANKS)]
        rows.append({"window": window, "rates": rates, "tokens": len(found)})
        table.add_row(str(window or "all"), *(f"{rate:.3f}" for rate in rates))
    Console(width=100).print(table)
    if options.json:
        setting = common.setting(target=options.target, draft=options.draft, set=options.set)
        common.write(options.json, setting, prompt_lengths=lengths, rows=rows)


if __name__ == "__main__":
    main()
