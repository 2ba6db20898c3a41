"""What the turns of peers.py say: medians, ratios, and the table."""

from __future__ import annotations

from statistics import median
from typing import Any

from rivals import COLD, REDWOOD_PLAIN, WARM

Turns = dict[str, list[dict[str, Any]]]


def summary(name: str, turns: Turns) -> dict[str, Any]:
    """What the rounds of one way say."""
    own, plain = turns[name], turns.get(REDWOOD_PLAIN, [])
    rates = [each["tokens_per_s"] for each in own]
    line: dict[str, Any] = {"name": name, "tokens_per_s": round(median(rates), 1)}
    line["low_high"] = [round(min(rates), 1), round(max(rates), 1)]
    if plain:
        pairs = zip(own, plain, strict=True)
        ratios = [a["tokens_per_s"] / b["tokens_per_s"] for a, b in pairs]
        line["to_redwood_plain"] = [round(each, 3) for each in ratios]
        slower = zip(own, plain, strict=True)
        line["per_token_gain"] = round(
            median(b["per_token_ms"] / a["per_token_ms"] for a, b in slower), 3
        )
    for key in ("first_ms", "per_token_ms", "tokens_per_pass"):
        if key in own[0]:
            line[key] = round(median(each[key] for each in own), 3)
    first = own[0]["texts"]
    line["same_texts_over_rounds"] = all(each["texts"] == first for each in own)
    if plain:
        line["same_as_redwood_plain"] = sum(
            a == b for a, b in zip(first, plain[0]["texts"], strict=True)
        )
    return line | {"rounds": [{k: v for k, v in e.items() if k != "texts"} for e in own]}


def verdict(turns: Turns) -> dict[str, Any]:
    """Redwood's cold and warm against the quickest peer, by medians over rounds."""
    peers = [name for name in turns if not name.startswith("Redwood")]
    if not peers:
        return {}
    rate = {name: median(each["tokens_per_s"] for each in turns[name]) for name in turns}
    best = max(peers, key=lambda name: rate[name])
    own = {name: round(rate[name] / rate[best], 3) for name in (COLD, WARM) if name in rate}
    return {"best_peer": best, "to_best_peer": own}


def show(result: dict[str, Any]) -> None:
    """The table of a result file."""
    print(f"\n{result['target']}, {result['set']}, at most {result['max_tokens']} tokens\n")
    print("| at a time | server | tokens/s (rounds) | to Redwood plain | first token | per token |")
    print("| --- | --- | --- | --- | --- | --- |")
    for part in result["parts"]:
        for line in part["lines"]:
            low, high = line["low_high"]
            ratio = line.get("to_redwood_plain")
            ratio = f"{median(ratio):.2f} ({min(ratio):.2f} .. {max(ratio):.2f})" if ratio else ""
            cells = [line["name"], f"{line['tokens_per_s']} ({low} .. {high})", ratio]
            cells += [f"{line['first_ms']:.0f} ms", f"{line['per_token_ms']:.1f} ms"]
            print(f"| {part['concurrency']} | {' | '.join(cells)} |")
    for part in result["parts"]:
        if "best_peer" in part:
            told = ", ".join(f"{name}: {x:.2f}" for name, x in part["to_best_peer"].items())
            print(f"\nAt {part['concurrency']}, to the best peer ({part['best_peer']}): {told}")
    for name, reason in result["left_out"].items():
        print(f"\nLeft out: {name}: {reason}")
