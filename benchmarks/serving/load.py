"""Tokens per second and waiting times at several concurrencies, with and without speculation.

    python benchmarks/serving/load.py --concurrency 1 4 16
    python benchmarks/serving/load.py --concurrency 64        # adds to the same result file

That many clients at a time stream answers at temperature 0 to prompts of two kinds, half open
questions, half edits of a text that stands in the prompt. With and without speculation
(`redwood.speculate`) take turns on one server. Run it alone on a machine. A small client of our own
reads the streams, since on two cores a heavier one would be measured, too.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cases import user
from raw import Wire, parse, request
from running import Server, add_server, save, serving, setting

RESULT = Path(__file__).parents[1] / "results" / "serving_load.json"
EDITS = Path(__file__).parents[1] / "prompts" / "editing_test.jsonl"
CHAT = "/v1/chat/completions"
OPEN = (
    "Explain why the sky is blue.",
    "Write a short story about a lighthouse.",
    "How does a bicycle stay upright?",
    "What should one know before a first marathon?",
    "Describe the water cycle.",
    "Give advice for a job interview.",
    "Why do leaves change colour in autumn?",
    "Compare cats and dogs as pets.",
)


def prompts() -> list[str]:
    """Questions and edits in turns."""
    edits = [json.loads(line)["prompt"] for line in EDITS.read_text().splitlines()]
    return [text for pair in zip(OPEN, edits, strict=False) for text in pair]


async def stream(server: Server, text: str, speculate: bool, most: int) -> dict[str, Any]:
    """One answer: when its parts came, and how many tokens it had."""
    body = {
        "messages": [user(text)],
        "temperature": 0,
        "max_tokens": most,
        "stream": True,
        "stream_options": {"include_usage": True},
        "redwood": {"speculate": speculate},
    }
    start, times, received = time.perf_counter(), [], b""
    async with Wire(server) as wire:
        await wire.send(request(server, CHAT, body))
        while part := await wire.read():
            received += part
            parts = part.count(b'"content":') - part.count(b'"content":""')  # less the role's
            times += [time.perf_counter()] * parts
    reply = parse(received)
    if reply.status != 200 or not reply.done:
        raise SystemExit(f"no answer: {reply.status} {reply.body[-300:]!r}")
    usage = reply.events[-1]["usage"]
    tokens = usage["completion_tokens"]
    return {
        "tokens": tokens,
        "first_s": times[0] - start,
        "gaps_s": [later - earlier for earlier, later in zip(times, times[1:], strict=False)],
        "per_token_s": (times[-1] - times[0]) / max(1, tokens - 1),
        "seconds": times[-1] - start,
        "passes": usage["redwood"]["target_passes"],
        "text": "".join(reply.texts()),
    }


async def measure(
    server: Server, concurrency: int, num: int, speculate: bool, most: int
) -> tuple[float, list[dict[str, Any]]]:
    """Seconds for `num` answers, `concurrency` at a time, and what is known of each."""
    texts = prompts()
    left = iter(range(num))
    found: list[dict[str, Any]] = []

    async def client() -> None:
        for index in left:
            text = texts[index % len(texts)]
            found.append({"index": index, **await stream(server, text, speculate, most)})

    start = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(concurrency)))
    return time.perf_counter() - start, sorted(found, key=lambda each: int(each["index"]))


def quantile(values: Sequence[float], share: float) -> float:
    """The value below which this share of them lies, in milliseconds."""
    ordered = sorted(values)
    return round(1000 * ordered[min(len(ordered) - 1, int(share * len(ordered)))], 1)


def summary(rounds: Sequence[tuple[float, list[dict[str, Any]]]]) -> dict[str, Any]:
    """What the rounds of one setting say together."""
    answers = [answer for _, found in rounds for answer in found]
    rates = [sum(each["tokens"] for each in found) / seconds for seconds, found in rounds]
    tokens = sum(answer["tokens"] for answer in answers)
    waits = {
        "first_token_ms": [answer["first_s"] for answer in answers],
        "between_parts_ms": [gap for answer in answers for gap in answer["gaps_s"]],
        "per_token_ms": [answer["per_token_s"] for answer in answers],
        "whole_ms": [answer["seconds"] for answer in answers],
    }
    return {
        "answers": len(answers),
        "tokens": tokens,
        "tokens_per_s": round(tokens / sum(seconds for seconds, _ in rounds), 1),
        "tokens_per_s_by_round": [round(rate, 1) for rate in rates],
        "tokens_per_pass": round(tokens / sum(answer["passes"] for answer in answers), 2),
        **{
            name: {"p50": quantile(values, 0.5), "p95": quantile(values, 0.95)}
            for name, values in waits.items()
        },
    }


def run(server: Server, concurrency: int, rounds: int, most: int) -> list[dict[str, Any]]:
    """Both ways at one concurrency, in turns."""
    num = max(16, concurrency)
    made: dict[bool, list[Any]] = {False: [], True: []}
    for turn in range(rounds):
        for speculate in (False, True) if turn % 2 == 0 else (True, False):
            made[speculate].append(asyncio.run(measure(server, concurrency, num, speculate, most)))
    texts = [[answer["text"] for answer in found] for both in made.values() for _, found in both]
    lines = []
    for speculate, both in made.items():
        line = {"concurrency": concurrency, "speculate": speculate, **summary(both)}
        line["same_texts"] = all(each == texts[0] for each in texts)
        print(line, flush=True)
        lines.append(line)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_server(parser)
    parser.set_defaults(threads=2)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--max-tokens", type=int, default=48)
    options = parser.parse_args()
    lines = []
    with serving(options) as server:
        asyncio.run(measure(server, 2, 4, True, 8))  # warm
        for concurrency in options.concurrency:
            lines += run(server, concurrency, options.rounds, options.max_tokens)
    kept = []
    if RESULT.exists():
        kept = json.loads(RESULT.read_text())["lines"]
        kept = [each for each in kept if each["concurrency"] not in options.concurrency]
    facts = {"threads": options.threads, "max_tokens": options.max_tokens}
    for line in lines:
        line["setting"] = {**setting(), **facts}
    save("load", {"lines": sorted(kept + lines, key=lambda each: each["concurrency"])})


if __name__ == "__main__":
    main()
