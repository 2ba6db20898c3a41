"""Acceptance by law and rule over temperature and top-p: Sequoia, SpecInfer, top-k, traversal.

    python benchmarks/rules.py --record qwen_0.6
    python benchmarks/rules.py --record noisy_0.6 --tree 8 --contexts 100

One level: the chance that one of k children is accepted, over all positions of the record, by the
formulas of `one_level` (recursive and traversal are the same there). Redwood's drafter is truncated
by top-p as the target is; "full draft" leaves it whole, as the paper does, and "cut last" draws
what top-p cuts when all else is used up.

With --tree the pair is opened and, at some positions, the same small tree is drawn by each law,
scored, and judged by each rule; `verify`'s own code runs through every outcome of its coins, so
only the draw of the tree is random. The tree has the optimal shape for the record's acceptance
vector, that of Sequoia's law. The texts were decoded at the record's temperature, whatever
temperature the laws are taken at.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import common
import numpy as np
from laws import Array, Record, mean_by_prompt, ratio
from one_level import Draws, point, with_replacement, without_replacement
from plots import Curve, Panel, save_panels
from record import command, fill, open_pair
from trees import acceptance

from redwood import verify
from redwood.algorithms.sequoia import optimal_tree
from redwood.backends.base import Nodes
from redwood.drafters.base import ModelDrafter
from redwood.drafters.context import Context
from redwood.sampling import History, PathRows, SamplingParams
from redwood.testing.enumeration import Rule, Script, runs
from redwood.tree import Law, TokenTree

SEQUOIA = {"Sequoia": "cut", "Sequoia, full draft": "full", "Sequoia, cut last": "last"}
LAWS = {
    "Sequoia": "without_replacement",
    "Sequoia, full draft": "without_replacement",
    "SpecInfer": "with_replacement",
    "top-k": "point",
}
RULES: dict[str, Rule] = {"recursive": verify.recursive, "traversal": verify.traversal}


class Coins:
    """Every way that the coins fall, one per run; the extra token is not drawn."""

    def __init__(self, script: Script) -> None:
        self._script = script

    def coin(self, node: int, probability: float) -> bool:
        """Takes both branches in turn."""
        chance = min(1.0, max(0.0, float(probability)))
        return self._script.choose([chance, 1.0 - chance]) == 0

    def draw(self, probs: Array) -> int:
        """Returns token 0."""
        return 0


def tokens_per_step(rule: Rule, tree: TokenTree, target_probs: Array) -> float:
    """Returns the expected number of tokens that a step with this tree gives, coins integrated."""
    outcomes = runs(lambda script: rule(tree, target_probs, Coins(script)))
    return sum(chance * len(acceptance.nodes) for chance, acceptance in outcomes)


def one_level(record: Record, temperature: float, top_p: float, options: Any) -> dict[str, Any]:
    """Acceptance of one level by law, for each number of children, and the laws' distance."""
    most = max(options.children)
    laws = record.laws(temperature, top_p)
    order = np.broadcast_to(np.arange(most), (len(laws.target), most))
    rates = {
        "SpecInfer": with_replacement(laws.target, laws.draft, most),
        "top-k": point(laws.target, order, most),
    }
    for name, draft in SEQUOIA.items() if top_p < 1.0 else [("Sequoia", "cut")]:
        own, rng = record.laws(temperature, top_p, draft), np.random.default_rng(options.seed)
        how = Draws(most, options.draws, rng, record.facts["vocab_size"])
        rates[name] = without_replacement(own.target, own.draft, how)
    distance = 0.5 * np.abs(laws.target - laws.draft).sum(1)
    entry: dict[str, Any] = {"temperature": temperature, "top_p": top_p, "cut": laws.num_cut}
    entry["one_minus_tv"] = round(1.0 - float(distance.mean()), 5)
    for name, found in rates.items():
        accepted = found.cumsum(1)[:, [k - 1 for k in options.children]]
        pairs = [mean_by_prompt(column, record.prompts) for column in accepted.T]
        entry[name] = [round(value, 5) for value, _ in pairs]
        entry[f"{name}_error"] = [round(error, 5) for _, error in pairs]
    return entry


def spread_positions(record: Record, count: int) -> dict[int, list[int]]:
    """Places of about `count` positions, evenly over the record, by prompt."""
    chosen = np.unique(np.linspace(0, len(record.places) - 1, count).round().astype(int))
    found: dict[int, list[int]] = {}
    for at in chosen:
        found.setdefault(int(record.prompts[at]), []).append(int(record.places[at]))
    return found


def tree_table(record: Record, parents: Sequence[int], options: Any) -> list[dict[str, Any]]:
    """Tokens per step of a fixed tree by setting, law and rule; means over positions."""
    settings = [(t, p) for t in options.tree_temperatures for p in options.tree_top_ps]
    sums: dict[Any, dict[int, list[float]]] = {}
    with open_pair(record.facts["pair"], options.threads) as engine:
        model: Any = engine.drafter
        drafters = {
            name: ModelDrafter(model.backend, parents, law=law, width=record.facts["width"])
            for name, law in LAWS.items()
        }
        for prompt, places in spread_positions(record, options.contexts).items():
            text, row = record.text(prompt), engine.target.open()
            for place in places:
                fill(engine.target, row, text[engine.target.length(row) : place - 1])
                for setting in settings:
                    rng = np.random.default_rng([options.seed, prompt, place])
                    for name, drafter in drafters.items():
                        if setting[1] == 1.0 and name.endswith("full draft"):
                            continue  # nothing is cut
                        own = (setting[0], 1.0) if name.endswith("full draft") else setting
                        contexts = [
                            _context(prompt, text[:place], each, engine, rng)
                            for each in (own, setting)
                        ]
                        values = _judged(engine, drafter, row, *contexts)
                        for rule, value in values.items():
                            key = (*setting, name, rule)
                            sums.setdefault(key, {}).setdefault(prompt, []).append(value)
            engine.target.release(row)
            for drafter in drafters.values():
                drafter.release(prompt)
            print(f"prompt {prompt}", flush=True)
    return [_entry(key, sums) for key in sums]


def _context(
    key: int, text: list[int], setting: tuple[float, float], engine: Any, rng: np.random.Generator
) -> Context:
    params = SamplingParams(temperature=setting[0], top_p=setting[1])
    return Context(key, text, params, History(text), engine.target.vocab_size, rng)


def _judged(
    engine: Any, drafter: ModelDrafter, row: int, drafting: Context, context: Context
) -> dict[str, float]:
    """Draws one tree after a text, scores it, and judges it by each rule."""
    (tree,) = drafter.propose([drafting], [engine.target.capacity])
    (logits,) = engine.target.extend([Nodes(row, tree.token_list, tree.parent_list)])
    rows = PathRows(logits, tree, context.params, context.history)
    probs = np.stack([rows[node] for node in range(len(tree))])
    engine.target.truncate(row, len(context.token_ids) - 1)
    if tree.law_list[-1] == Law.POINT:  # traversal does the same there
        return {"recursive": tokens_per_step(verify.recursive, tree, probs)}
    return {name: tokens_per_step(rule, tree, probs) for name, rule in RULES.items()}


def _entry(key: tuple[Any, ...], sums: dict[Any, dict[int, list[float]]]) -> dict[str, Any]:
    """Tokens per step, and their ratio to Sequoia's on the same positions."""
    own = [sum(values) for values in sums[key].values()]
    published = [sum(values) for values in sums[(*key[:2], "Sequoia", "recursive")].values()]
    value, error = ratio(own, [len(values) for values in sums[key].values()])
    to_sequoia, its_error = ratio(own, published)
    return {
        **dict(zip(("temperature", "top_p", "law", "rule"), key, strict=True)),
        "tokens_per_step": round(value, 4),
        "error": round(error, 4),
        "to_sequoia": round(to_sequoia, 4),
        "to_sequoia_error": round(its_error, 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--record", required=True)
    temperatures = [0.1, 0.2, 0.4, 0.6, 0.8, 1.0, 1.2]
    parser.add_argument("--temperatures", type=float, nargs="+", default=temperatures)
    parser.add_argument("--top-ps", type=float, nargs="+", default=[1.0, 0.9, 0.8])
    parser.add_argument("--children", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--draws", type=int, default=64, help="per position")
    parser.add_argument("--tree", type=int, help="nodes of a fixed tree; opens the pair")
    parser.add_argument("--tree-temperatures", type=float, nargs="+", default=[0.2, 0.6, 1.0])
    parser.add_argument("--tree-top-ps", type=float, nargs="+", default=[1.0, 0.9, 0.8])
    parser.add_argument("--contexts", type=int, default=40, help="positions for the tree")
    parser.add_argument("--seed", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    record = Record.load(options.record)
    name = f"rules_{options.record}"
    result: dict[str, Any] = {"setting": common.setting(command=command())}
    result |= {"record": record.facts, "children": options.children, "one_level": []}
    for top_p in options.top_ps:
        for temperature in options.temperatures:
            result["one_level"].append(one_level(record, temperature, top_p, options))
            print(result["one_level"][-1], flush=True)
    if options.tree:
        rates, _ = acceptance(record, record.facts["temperature"], 32, options.draws)
        parents = optimal_tree(np.minimum(rates.mean(0), 1.0), options.tree)
        result |= {"tree": parents, "contexts": options.contexts}
        result["trees"] = tree_table(record, parents, options)
        for entry in result["trees"]:
            print(entry)
    common.save(name, result)
    picture(name, result)


def picture(name: str, result: dict[str, Any]) -> None:
    """Draws acceptance against temperature, a panel per top-p; the number is that of children."""
    children, panels = result["children"], []
    shown = [k for k in children if k in (1, 4)] or children[:1]
    for top_p in dict.fromkeys(entry["top_p"] for entry in result["one_level"]):
        own = [entry for entry in result["one_level"] if entry["top_p"] == top_p]
        x = [entry["temperature"] for entry in own]
        curves = [
            Curve(f"{law}, {k}", x, [e[law][children.index(k)] for e in own], color=4 * i + c)
            for i, k in enumerate(shown)
            for c, law in enumerate(LAWS)
            if law in own[0]
        ]
        panels.append(Panel(f"top-p {top_p}", "temperature", "acceptance", curves))
    save_panels(name, panels)


if __name__ == "__main__":
    main()
