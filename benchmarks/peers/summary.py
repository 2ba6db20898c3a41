"""From turns to rows and to the table: medians over prompts, ratios of single prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from peers.candidates import plain_of
from rich.table import Table

from redwood.bench.report import quartiles

Runs = Mapping[str, Sequence[Mapping[str, Any]]]
REDWOOD = "Redwood"


def quiet(runs: Runs, limit: float) -> list[int]:
    """The prompts whose turns all had the processors for themselves, and all have a speed."""
    rounds = list(zip(*runs.values(), strict=True))
    return [
        i
        for i, turns in enumerate(rounds)
        if all(turn["tokens_per_s"] > 0 and turn["others"] <= limit for turn in turns)
    ]


def summary(runs: Runs, ends: Sequence[int], *, greedy: bool, limit: float) -> dict[str, Any]:
    """Rows, and Redwood's best against the best of the peers; speeds are of quiet prompts only."""
    timed = quiet(runs, limit)
    result: dict[str, Any] = {"timed": len(timed), "prompts": len(next(iter(runs.values()), ()))}
    if not timed:
        return result | {"rows": []}
    speeds = {name: [turns[i]["tokens_per_s"] for i in timed] for name, turns in runs.items()}
    best = fastest(speeds, redwood=True)
    rows = [_row(name, runs, timed, speeds, best) for name in runs]
    for row in rows if greedy else ():
        row |= _same(row["name"], runs, ends)
    result |= {"rows": rows, "best": best}
    if any(not name.startswith(REDWOOD) for name in runs):
        nearest = fastest(speeds, redwood=False)
        ratios = _ratios(speeds[best], speeds[nearest])
        result |= {"nearest": nearest, "ratio": spread(ratios)}
    return result


def enough(result: Mapping[str, Any]) -> bool:
    """Whether half the prompts could be timed, and so whether there is a result at all."""
    return bool(result["timed"]) and result["timed"] * 2 >= result["prompts"]


def fastest(speeds: Mapping[str, Sequence[float]], *, redwood: bool) -> str:
    """The name with the highest median speed, among Redwood's or among the others."""
    names = [name for name in speeds if name.startswith(REDWOOD) == redwood]
    return max(names, key=lambda name: median(speeds[name]))


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Median and quartiles."""
    return (median(values), *quartiles(values))


def _row(
    name: str,
    runs: Runs,
    timed: Sequence[int],
    speeds: Mapping[str, Sequence[float]],
    best: str,
) -> dict[str, Any]:
    turns, plain = [runs[name][i] for i in timed], plain_of(name)
    row: dict[str, Any] = {"name": name, "tokens_per_s": spread(speeds[name])}
    row["best_to_this"] = spread(_ratios(speeds[best], speeds[name]))
    if plain in speeds:
        row["to_own_plain"] = spread(_ratios(speeds[name], speeds[plain]))
    row["with_prefill"] = median(1e3 * len(t["token_ids"]) / t["whole_ms"] for t in turns)
    row["first_ms"] = median(turn["first_ms"] for turn in turns)
    row["per_pass"] = median(turn["per_pass"] for turn in turns)
    row["others"] = max(turn["others"] for turn in runs[name])
    return row | {"errors": sum("error" in turn for turn in runs[name])}


def _same(name: str, runs: Runs, ends: Sequence[int]) -> dict[str, int]:
    """How many texts are equal to the own plain ones, and to Redwood's plain ones."""
    found = {}
    for key, other in (("own", plain_of(name)), ("redwood", plain_of(REDWOOD))):
        if other in runs:
            pairs = zip(runs[name], runs[other], strict=True)
            found[f"same_as_{key}_plain"] = sum(
                text(a["token_ids"], ends) == text(b["token_ids"], ends) for a, b in pairs
            )
    return found


def text(token_ids: Sequence[int], ends: Sequence[int]) -> list[int]:
    """The tokens before the end token, which not every peer hands out."""
    found = next((i for i, token in enumerate(token_ids) if token in ends), len(token_ids))
    return list(token_ids[:found])


def _ratios(numerators: Sequence[float], denominators: Sequence[float]) -> list[float]:
    return [a / b for a, b in zip(numerators, denominators, strict=True)]


def table(title: str, result: Mapping[str, Any]) -> Table:
    """All candidates of one run."""
    made = Table(title=title)
    made.add_column("", no_wrap=True)
    headers = ("tokens/s (quartiles)", "x own plain", "best Redwood / this", "with prefill")
    headers += ("tokens /pass", "first ms", "= own plain", "= Redwood plain")
    for header in headers:
        made.add_column(header, justify="right", no_wrap="quartiles" in header)
    for row in result["rows"]:
        cells = ["{:.1f} ({:.1f} .. {:.1f})".format(*row["tokens_per_s"])]
        cells += [f"{row['to_own_plain'][0]:.2f}" if "to_own_plain" in row else ""]
        cells += [f"{row['best_to_this'][0]:.2f}", f"{row['with_prefill']:.1f}"]
        cells += [f"{row['per_pass']:.2f}", f"{row['first_ms']:.0f}"]
        same = (row.get("same_as_own_plain"), row.get("same_as_redwood_plain"))
        cells += ["" if count is None else f"{count}/{result['prompts']}" for count in same]
        chosen = row["name"] in (result["best"], result.get("nearest"))
        made.add_row(row["name"], *cells, style="bold" if chosen else None)
    return made


def verdict(result: Mapping[str, Any], weights: Mapping[str, str]) -> str:
    """What to say under the table: the nearest peer, the weights of both, and who failed."""
    if "nearest" not in result:
        return "No peer took part."
    best, nearest = result["best"], result["nearest"]
    low, high = result["ratio"][1:]
    errors = [
        f"{row['name']} failed {row['errors']} times." for row in result["rows"] if row["errors"]
    ]
    used = [weights[name.partition(" ")[0]] for name in (best, nearest)]
    said = (
        f"{best} is {result['ratio'][0]:.2f} (quartiles {low:.2f} to {high:.2f}) times as fast as "
        f"the nearest peer, {nearest}. Weights: {used[0]}; {used[1]}."
    )
    return " ".join([said, *errors])


def line(run: Mapping[str, Any]) -> str:
    """A line of the table over all runs, in Markdown."""
    result = run["result"]
    start = f"| {run['target']} | {run['set']} | {run['temperature']} | {result['timed']} |"
    if not enough(result) or "nearest" not in result:
        return f"{start} no result | | |"
    rows = {row["name"]: row for row in result["rows"]}
    cells = [f"{n}: {rows[n]['tokens_per_s'][0]:.1f}" for n in (result["best"], result["nearest"])]
    ratio = "**{:.2f}** ({:.2f} .. {:.2f})".format(*result["ratio"])
    return f"{start} {' | '.join(cells)} | {ratio} |"


HEADER = """| model | prompts | temperature | count | Redwood, tokens/s | nearest peer | ratio |
| --- | --- | --- | --- | --- | --- | --- |"""
