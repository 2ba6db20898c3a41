"""Tokens per step against the size of the tree: Sequoia's optimum, chains, complete trees.

    python benchmarks/trees.py --record qwen_0.6
    python benchmarks/trees.py --record noisy_0.6 --decode 2 4 8 16 32 64 --prompts FILE.jsonl

All children are drawn without replacement and judged by the recursive rule (arXiv 2402.12374).
Predicted: the record's acceptance vector (coins integrated out) gives the value of any tree by
`expected_tokens`, which takes all positions to be alike. In context: the same tree along the
record's own texts, place by place, without that assumption. Measured, with --decode: real decoding
of other prompts by the record's pair. Standard errors are over prompts.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from typing import Any

import common
import numpy as np
from laws import Record, greedy_laws, ratio
from one_level import Draws, point, without_replacement, without_replacement_of
from plots import Curve, Panel, save_panels
from record import add_prompts, chosen_prompts, command, open_pair

import redwood
from redwood.algorithms.sequoia import expected_tokens, optimal_tree
from redwood.bench.interleave import Candidate, run
from redwood.drafters.base import ModelDrafter
from redwood.engine.engine import Step
from redwood.sampling import SamplingParams
from redwood.tree import children_of, depths_of

SIZES = tuple(2**i for i in range(10))
CHAINS = (1, 4, 16)
ARITIES = (2, 4)


def chains(count: int, size: int) -> list[int]:
    """Returns the parents of `size` nodes in independent chains below the root, alike in length."""
    return [-1, *(max(0, node - count) for node in range(1, size))]


def complete_tree(arity: int, size: int) -> list[int]:
    """Returns the parents of the first `size` nodes of a complete tree, level by level."""
    return [-1, *((node - 1) // arity for node in range(1, size))]


def shapes(size: int, vector: Sequence[float]) -> dict[str, list[int]]:
    """Returns the trees of `size` nodes that are compared."""
    made = {"optimal": optimal_tree(vector, size)}
    made |= {f"{k} chains" if k > 1 else "chain": chains(k, size) for k in CHAINS}
    return made | {f"{k}-ary": complete_tree(k, size) for k in ARITIES}


def acceptance(record: Record, temperature: float, children: int, draws: int) -> tuple[Any, Any]:
    """Returns rates and shares [P, children] for `in_context`; shares are 0 off the laws' columns.

    At temperature 0 the shares mean something for texts decoded at 0 alone.
    """
    laws = greedy_laws(record) if temperature == 0.0 else record.laws(temperature)
    text = [record.text(i) for i in range(len(record.ends))]
    tokens = [text[i][place] for i, place in zip(record.prompts, record.places, strict=True)]
    same = record.draft_ids == np.array(tokens)[:, None]
    columns = same.argmax(1)
    if temperature == 0.0:
        order = np.broadcast_to(np.arange(children), (len(columns), children))
        rates = point(laws.target, order, children)
        return rates, rates * same[:, :children]
    # The same seed, so the same histories.
    how = [
        Draws(children, draws, np.random.default_rng(0), record.facts["vocab_size"])
        for _ in range(2)
    ]
    rates = without_replacement(laws.target, laws.draft, how[0])
    kept = without_replacement_of(laws.target, laws.draft, columns, how[1])
    chance = np.take_along_axis(laws.target, columns[:, None], 1)
    hit = same.any(1, keepdims=True) & (chance > 0.0)
    return rates, np.where(hit, kept / np.where(hit, chance, 1.0), 0.0)


def predicted(parents: Sequence[int], rates: Any, prompts: Any) -> tuple[float, float]:
    """Expected tokens per step, and the standard error by leaving out one prompt at a time."""
    whole = expected_tokens(parents, np.minimum(rates.mean(0), 1.0))
    units = np.unique(prompts)
    if len(units) < 2:
        return whole, float("nan")
    left_out = [
        expected_tokens(parents, np.minimum(rates[prompts != unit].mean(0), 1.0)) for unit in units
    ]
    return whole, float(np.sqrt(np.var(left_out) * (len(units) - 1)))


def in_context(
    record: Record, parents: Sequence[int], rates: Any, shares: Any
) -> tuple[float, float]:
    """Tokens per step along the texts, without the assumption that positions are alike.

    A node is the text's own token with the chance that plain decoding gives it, so the chance that
    a path is kept is the mean, over places in texts drawn by the target, of the product of
    P(kept and this token) / P(this token). Steps that reach beyond a text are left out.

    Args:
        rates: [P, ranks], the chance that the child of a rank is the accepted one.
        shares: [P, ranks], the same for the text's token, over the target's chance of it.
    """
    children = children_of(parents)
    ends = np.append(record.prompts[1:] != record.prompts[:-1], True)
    values: list[Any] = [None] * len(parents)
    for node in reversed(range(len(parents))):
        values[node] = np.ones(len(ends))
        for rank, child in enumerate(children[node][: rates.shape[1]]):
            if children[child]:
                after = np.where(ends, np.nan, np.roll(values[child], -1))
                values[node] = values[node] + shares[:, rank] * after
            else:
                values[node] = values[node] + rates[:, rank]
    seen = np.isfinite(values[0])
    units = [seen & (record.prompts == unit) for unit in np.unique(record.prompts[seen])]
    return ratio([values[0][own].sum() for own in units], [own.sum() for own in units])


def decoded(
    engine: redwood.Engine,
    drafter: ModelDrafter,
    size: int,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
) -> tuple[float, float]:
    """Tokens per step of real decoding, steps with a whole tree alone; its standard error."""
    tokens, steps = [0] * len(prompts), [0] * len(prompts)
    for i, prompt in enumerate(prompts):

        def count(step: Step, i: int = i) -> None:
            if len(step.tree) == size:  # the last step of a text may have room for less
                tokens[i] += len(step.nodes)
                steps[i] += 1

        run(engine, Candidate("", drafter, size), prompt, params, count)
    return ratio(tokens, steps)


def numbers(name: str, value: float, error: float) -> dict[str, float]:
    """A value and its standard error, as they stand in a table."""
    return {name: round(value, 4), f"{name}_error": round(error, 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--record", required=True)
    parser.add_argument("--children", type=int, default=64, help="ranks of the acceptance vector")
    parser.add_argument("--draws", type=int, default=64, help="per position")
    parser.add_argument("--decode", type=int, nargs="*", default=[], help="sizes to decode with")
    parser.add_argument(
        "--max-levels", type=int, default=20, help="of trees in context, decoded with"
    )
    rules = ["recursive", "traversal"]
    parser.add_argument("--rules", nargs="+", default=rules, help="the others for the optimum only")
    add_prompts(parser, 12, required=False)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--seed", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    record = Record.load(options.record)
    temperature = record.facts["temperature"]
    rates, shares = acceptance(record, temperature, options.children, options.draws)
    vector = [float(rate) for rate in rates.mean(0)]
    table = []
    for size in SIZES:
        for name, parents in shapes(size, vector).items():
            levels = max(depths_of(parents)) + 1
            entry: dict[str, Any] = {"shape": name, "size": size, "levels": levels}
            entry |= numbers("predicted", *predicted(parents, rates, record.prompts))
            if levels <= options.max_levels:
                entry |= numbers("in_context", *in_context(record, parents, rates, shares))
            table.append(entry)
    name = f"trees_{options.record}"
    result: dict[str, Any] = {"setting": common.setting(command=command())}
    result |= {"record": record.facts, "positions": len(rates)}
    result |= {"acceptance": [round(rate, 6) for rate in vector], "results": table}
    if options.decode:
        for _ in decode_all(options, record, vector, table):
            common.save(name, result)  # after every tree: a long run can be cut off
            picture(name, table, record)
    common.save(name, result)
    picture(name, table, record)


def decode_all(
    options: argparse.Namespace, record: Record, vector: list[float], table: list[Any]
) -> Iterator[None]:
    """Adds what real decoding gives to the entries asked for, one at a time."""
    with open_pair(record.facts["pair"], options.threads) as engine:
        model: Any = engine.drafter
        prompts = chosen_prompts(engine, options)
        asked = [e for e in table if e["size"] in options.decode]
        for entry in asked:
            parents = shapes(entry["size"], vector)[entry["shape"]]
            if entry["levels"] > options.max_levels:
                continue
            drafter = ModelDrafter(model.backend, parents, width=record.facts["width"])
            for rule in options.rules if entry["shape"] == "optimal" else options.rules[:1]:
                params = SamplingParams(
                    max_tokens=options.max_tokens,
                    temperature=record.facts["temperature"],
                    seed=options.seed,
                    verifier=rule,
                )
                entry |= numbers(rule, *decoded(engine, drafter, entry["size"], prompts, params))
            print(entry, flush=True)
            yield


def picture(name: str, table: list[dict[str, Any]], record: Record) -> None:
    """Draws predictions by the vector and in context, a panel each, with what decoding gave."""
    panels = []
    for source, title in (("predicted", "from the vector"), ("in_context", "along the texts")):
        curves = []
        for color, shape in enumerate(dict.fromkeys(entry["shape"] for entry in table)):
            own = [entry for entry in table if entry["shape"] == shape]
            known = [entry for entry in own if source in entry]
            curve = [entry["size"] for entry in known], [entry[source] for entry in known]
            curves.append(Curve(shape, *curve, color=color))
            seen = [entry for entry in own if "recursive" in entry]
            if seen:
                points = [e["size"] for e in seen], [e["recursive"] for e in seen]
                errors = [e["recursive_error"] for e in seen]
                curves.append(Curve(f"{shape}, decoded", *points, errors, True, color))
        panels.append(Panel(title, "nodes", "tokens per step", curves, log_x=True))
    save_panels(name, panels)


if __name__ == "__main__":
    main()
