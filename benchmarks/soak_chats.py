"""Chats of many turns on one engine, with cancels and evictions, for a while: memory and tokens.

    python benchmarks/soak_chats.py [--target NAME] [--minutes 30] [--kv-cache 64MiB]

Eight chats at a time share one system prompt and grow by turns until they are long; requests are
cancelled at random and the bound is small, so that texts go all the time. One answer in eight is
computed once more by an engine that keeps nothing, and must have the same tokens. Prints a line of
JSON each minute: requests, wrong answers, hit rate, evictions, memory.
"""

from __future__ import annotations

import argparse
import json
import random
from time import monotonic

import psutil

import redwood
from redwood.sampling import SamplingParams

CHATS, LONGEST, ANSWER = 8, 700, 16


def main() -> None:
    """Runs for so many minutes; ends with an error if an answer was wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", default="smollm2-135m-instruct")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--kv-cache", default="64MiB")
    given = parser.parse_args()
    how = dict(drafter="ngram", budget=4, backend="native", max_rows=6)
    engine = redwood.load(given.target, kv_cache=given.kv_cache, **how)
    plain = redwood.load(given.target, kv_cache=0, **how)
    params = SamplingParams(max_tokens=ANSWER, temperature=0, ignore_eos=True)
    system = list(engine.encode("You answer briefly, and in plain words. " * 12))
    words = list(engine.encode("Tell me more about the weather, the market and the old mill. " * 9))
    rng = random.Random(0)
    chats = [list(system) for _ in range(CHATS)]
    running: dict[int, tuple[int, list[int]]] = {}  # by request: its chat and its answer
    asked: dict[int, list[int]] = {}
    counts = dict.fromkeys(("requests", "cancelled", "checked", "wrong", "failed"), 0)
    begin = said = monotonic()
    while monotonic() - begin < 60 * given.minutes:
        busy = {chat for chat, _ in running.values()}
        for chat in set(range(CHATS)) - busy:
            if len(chats[chat]) > LONGEST:
                chats[chat] = list(system)
            start = rng.randrange(len(words) - 60)
            prompt = [*chats[chat], *words[start : start + rng.randint(5, 60)]]
            key = engine.add(prompt, params)
            running[key], asked[key] = (chat, []), prompt
            counts["requests"] += 1
        if rng.random() < 0.02:
            key = rng.choice(list(running))
            engine.cancel(key)
            counts["cancelled"] += 1
            del running[key], asked[key]
        for step in engine.step():
            if step.request not in running:
                continue
            chat, made = running[step.request]
            made += step.token_ids
            if step.finish_reason is None:
                continue
            prompt = asked.pop(step.request)
            del running[step.request]
            counts["failed"] += step.error is not None
            if rng.random() < 0.125:
                counts["checked"] += 1
                right = plain.generate(prompt, max_tokens=ANSWER, temperature=0, ignore_eos=True)
                counts["wrong"] += right.token_ids != made
            chats[chat] = [*prompt, *made]
        if monotonic() - said > 60:
            said = monotonic()
            memory = psutil.Process().memory_info().rss >> 20
            print(
                json.dumps(
                    {
                        "minute": round((said - begin) / 60),
                        **counts,
                        "hit_rate": round(engine.prefixes.hit_rate, 3),
                        "evictions": engine.prefixes.num_evictions,
                        "pages": engine.prefixes.num_pages,
                        "memory_mib": memory,
                    }
                ),
                flush=True,
            )
    raise SystemExit(counts["wrong"] + counts["failed"] > 0)


if __name__ == "__main__":
    main()
