"""Time to first token with and without keys and values that stay, in turns.

    python benchmarks/prefix_reuse.py [--target smollm2-135m-instruct] [--rounds 3] [--only NAME]

Cases: the second turn of a chat with a long prompt; 16 requests with one system prompt; a short
request that comes half a second after a long one; ten decoding rows beside a long prompt; decoding
alone, which must not become slower. Prints a line of JSON each.
"""

from __future__ import annotations

import argparse
import json
import statistics
from time import perf_counter
from typing import Any

import redwood
from redwood.engine.text import Engine
from redwood.sampling import SamplingParams

LONG, SYSTEM, SHORT, ROWS = 2500, 1000, 20, 10


def answer(tokens: int) -> SamplingParams:
    """Plain decoding of so many tokens, so that nothing but reading differs."""
    return SamplingParams(max_tokens=tokens, ignore_eos=True, speculate=False)


def text(engine: Engine, tokens: int, start: int = 0) -> list[int]:
    """English text of so many tokens; texts with different starts have no common beginning."""
    words = " ".join(
        f"Record {i}: the parcel {i * 37 % 101} is due." for i in range(start, start + tokens)
    )
    return list(engine.encode(words))[:tokens]


def first_tokens(engine: Engine, prompts: list[list[int]], tokens: int = 1) -> dict[int, float]:
    """Seconds to the first token of each prompt, all added at once."""
    start = perf_counter()
    keys = [engine.add(prompt, answer(tokens)) for prompt in prompts]
    times: dict[int, float] = {}
    while engine.busy:
        for step in engine.step():
            times.setdefault(step.request, perf_counter() - start)
    return {i: times[key] for i, key in enumerate(keys)}


def second_turn(engine: Engine, number: int) -> dict[str, float]:
    """First token of a first turn, and of a second one that has the first and 40 tokens more."""
    prompt = text(engine, LONG, 10_000 * number)
    start, said = perf_counter(), []
    first = 0.0
    engine.add(prompt, answer(20))
    while engine.busy:
        for step in engine.step():
            first = first or perf_counter() - start
            said += step.token_ids
    turn = [*prompt, *said, *text(engine, 40, 7)]
    return {"first_s": first, "second_s": first_tokens(engine, [turn])[0]}


def one_system_prompt(engine: Engine, number: int) -> dict[str, float]:
    """Until all of 16 requests have their first token, against one alone."""
    alone = first_tokens(engine, [text(engine, SYSTEM, 10_000 * number) + text(engine, SHORT, 7)])
    engine.prefixes.clear()
    system = text(engine, SYSTEM, 10_000 * number + 5000)
    asked = [system + text(engine, SHORT, 11 * i) for i in range(16)]
    return {"one_s": alone[0], "sixteen_s": max(first_tokens(engine, asked).values())}


def short_beside_long(engine: Engine, number: int) -> dict[str, float]:
    """First token of a short request alone, and half a second after a long one."""
    alone = first_tokens(engine, [text(engine, SHORT, 10_000 * number + 9000)])[0]
    engine.prefixes.clear()
    engine.add(text(engine, LONG, 10_000 * number), answer(1))
    begin, key, asked, first = perf_counter(), -1, 0.0, 0.0
    while engine.busy:
        if key < 0 and perf_counter() - begin > 0.5:
            asked = begin + 0.5  # it came during the step that has just ended
            key = engine.add(text(engine, SHORT, 10_000 * number + 8000), answer(1))
        for step in engine.step():
            if step.request == key:
                first = perf_counter() - asked
    return {"alone_s": alone, "beside_s": first}


def rows_beside_long(engine: Engine, number: int) -> dict[str, float]:
    """The 99th percentile of seconds between tokens of ten rows, without and with a long prompt."""
    rows = [
        engine.add(text(engine, SHORT, 10_000 * number + 100 * i), answer(400)) for i in range(ROWS)
    ]
    while sum(engine.stats(key).num_generated_tokens > 0 for key in rows) < ROWS:
        engine.step()
    gaps: dict[str, list[float]] = {"without_s": [], "with_s": []}
    long = -1
    for count in range(240):
        if count == 100:
            long = engine.add(text(engine, LONG, 10_000 * number + 5000), answer(1))
        start = perf_counter()
        steps = engine.step()
        if any(step.request == long for step in steps):
            break
        gaps["with_s" if long >= 0 else "without_s"].append(perf_counter() - start)
    for key in [*rows, long]:
        engine.cancel(key)
    return {name: statistics.quantiles(values, n=100)[98] for name, values in gaps.items()}


def decoding(engine: Engine, number: int) -> dict[str, float]:
    """Seconds of a step of one row and of eight, medians."""
    made = {}
    for rows in (1, 8):
        for i in range(rows):
            engine.add(text(engine, SHORT, 10_000 * number + 100 * i), answer(60))
        times = []
        while engine.busy:
            start = perf_counter()
            engine.step()
            times.append(perf_counter() - start)
        made[f"t{rows}_s"] = statistics.median(times)
    return made


CASES = (second_turn, one_system_prompt, short_beside_long, rows_beside_long, decoding)


def main() -> None:
    """Runs the cases and prints medians of each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", default="smollm2-135m-instruct")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=[case.__name__ for case in CASES])
    parser.add_argument("--prefill-beside", type=int)
    given = parser.parse_args()
    engines: dict[str, Engine] = {
        "without": redwood.load(given.target, kv_cache=0, prefill_beside=given.prefill_beside),
        "with": redwood.load(given.target, kv_cache="2GiB", prefill_beside=given.prefill_beside),
    }
    for case in CASES:
        if given.only not in (None, case.__name__):
            continue
        found: dict[str, list[dict[str, Any]]] = {name: [] for name in engines}
        for number in range(given.rounds):
            for name, engine in engines.items():
                engine.prefixes.clear()
                found[name].append(case(engine, number))
        for name, each in found.items():
            median = {k: round(statistics.median(r[k] for r in each), 4) for k in each[0]}
            values = list(median.values())
            ratio = round(values[1] / values[0], 3)
            print(
                json.dumps({"case": case.__name__, "cache": name, **median, "ratio": ratio}),
                flush=True,
            )


if __name__ == "__main__":
    main()
