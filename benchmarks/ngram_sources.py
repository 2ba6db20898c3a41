"""N-gram drafts by published constants and by what was learned, with and without a datastore.

    python benchmarks/ngram_sources.py --answers smollm2 --more smollm2_0.8_1 smollm2_humaneval

Recorded answers (replay.py) are dealt into three parts by prompt. One, with further answers to its
own prompts or to prompts of neither other part, fills the datastore; one calibrates; one is
replayed for the table; then the parts change places.

Published: SSSD's priorities, which learn nothing. Untrained: the tables begin with their priors,
and learn while they are replayed. Calibrated: they have seen the second part before. Union: text
and datastore as two drafters with half the budget each, calibrated as well.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
import time
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import common
from laws import ratio
from replay import GREEDY, Answer, Replay, load_answers, replay_all

from redwood.datastore import Datastore, create
from redwood.datastore.store import TokenizerId
from redwood.drafters.base import Drafter, NgramDrafter, UnionDrafter
from redwood.sampling import SamplingParams

PARTS = 3
UNSTEERED = SamplingParams(temperature=1.0, seed=0, verifier="traversal")
"""Of requests that get the published priorities."""
VARIANTS = (
    "text, published",
    "text, untrained",
    "text, calibrated",
    "both, published",
    "both, untrained",
    "both, calibrated",
    "union, calibrated",
)


def drafter_of(name: str, store: Datastore) -> Drafter:
    """A fresh drafter of a variant."""
    if name.startswith("text"):
        return NgramDrafter()
    if name.startswith("both"):
        return NgramDrafter(datastore=store)
    return UnionDrafter([NgramDrafter(), NgramDrafter(datastore=store, own_text=False)])


def tables_of(drafter: Drafter) -> list[Any]:
    """The tables that a drafter learns in."""
    parts: list[Any] = list(getattr(drafter, "parts", [drafter]))
    return [table for part in parts for table in (part.reliability, part.store_reliability)]


def measure(
    name: str,
    store: Datastore,
    known: Sequence[Answer],
    asked: Sequence[Answer],
    budgets: list[int],
) -> dict[int, list[Replay]]:
    """Replays `asked` with each budget; `known` is seen before where the variant says so."""
    params = UNSTEERED if "published" in name else GREEDY
    trained = drafter_of(name, store)
    if "calibrated" in name:
        replay_all(trained, known, max(budgets))
    found = {}
    for budget in budgets:
        drafter = drafter_of(name, store)
        for table, learned in zip(tables_of(drafter), tables_of(trained), strict=True):
            table.load(deepcopy(learned).to_dict())
        found[budget] = replay_all(drafter, asked, budget, params=params)
    return found


def row_of(replays: Sequence[Replay]) -> dict[str, float]:
    """Tokens and nodes per step over prompts, with the standard error."""
    steps = [replay.steps for replay in replays]
    tokens, error = ratio([replay.tokens for replay in replays], steps)
    nodes, _ = ratio([replay.nodes for replay in replays], steps)
    return {
        "tokens_per_step": round(tokens, 4),
        "error": round(error, 4),
        "nodes_per_step": round(nodes, 2),
    }


PAIRS = (
    ("text, calibrated", "text, published"),
    ("both, calibrated", "both, published"),
    ("both, calibrated", "both, untrained"),
    ("both, calibrated", "text, calibrated"),
    ("both, calibrated", "union, calibrated"),
)


def gain_of(replays: Sequence[Replay], others: Sequence[Replay]) -> dict[str, float]:
    """How many times fewer steps than others over the same prompts, with the paired error."""
    gain, error = ratio([other.steps for other in others], [replay.steps for replay in replays])
    return {"gain": round(gain, 4), "error": round(error, 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--answers", default="smollm2", help="record that is replayed")
    parser.add_argument("--more", nargs="*", default=[], help="records for the datastore alone")
    parser.add_argument("--budgets", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--result", default="ngram_sources")
    options = parser.parse_args()
    answers = [answer for answer in load_answers(options.answers) if len(answer.answer) > 1]
    more = [answer for name in options.more for answer in load_answers(name)]
    parts = [answers[i::PARTS] for i in range(PARTS)]
    found: dict[str, dict[int, list[Replay]]] = {
        name: {budget: [] for budget in options.budgets} for name in VARIANTS
    }
    sizes = []
    for turn in range(PARTS):
        asked, known, stored = (parts[(turn + i) % PARTS] for i in range(PARTS))
        kept_out = {tuple(answer.prompt) for answer in (*asked, *known)}
        texts = [answer.answer for answer in stored]
        texts += [answer.answer for answer in more if tuple(answer.prompt) not in kept_out]
        sizes.append(sum(map(len, texts)))
        with tempfile.TemporaryDirectory() as folder:
            store = create(Path(folder, "s"), TokenizerId("", 0, ""), texts)
            for name in VARIANTS:
                begin = time.time()
                for budget, replays in measure(name, store, known, asked, options.budgets).items():
                    found[name][budget] += replays
                print(f"part {turn + 1}: {name}, {time.time() - begin:.0f} s", flush=True)
    table = {name: {b: row_of(each) for b, each in rows.items()} for name, rows in found.items()}
    command = shlex.join(["python", "benchmarks/ngram_sources.py", *sys.argv[1:]])
    result: dict[str, Any] = {
        "setting": common.setting(command=command),
        "prompts": len(answers),
        "tokens": sum(len(answer.answer) for answer in answers),
        "datastore_tokens": sizes,
        "results": table,
        "gains": {
            f"{name} over {other}": {
                budget: gain_of(found[name][budget], found[other][budget])
                for budget in options.budgets
            }
            for name, other in PAIRS
        },
    }
    common.save(options.result, result)
    for name, rows in table.items():
        shown = [f"{row['tokens_per_step']:.3f} ± {row['error']:.3f}" for row in rows.values()]
        print(f"{name:20}", *shown, sep=" | ")
    for name, gains in result["gains"].items():
        print(f"{name:40}", *(f"{g['gain']:.3f} ± {g['error']:.3f}" for g in gains.values()))


if __name__ == "__main__":
    main()
