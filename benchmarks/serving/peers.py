"""The server against plain decoding and against other servers: the same load, weights, machine.

    python benchmarks/serving/peers.py --set editing --concurrency 1 --json OUT.json
    python benchmarks/serving/peers.py --prompts FILE --concurrency 4 --json OUT.json
    python benchmarks/serving/peers.py --show OUT.json ..

Every round starts each server in turn, in an order that moves on from round to round, warms it with
other prompts, and has that many clients stream answers at temperature 0. Tokens/s are the tokens
of all answers, as the server counts them, by the seconds from the first request to the last byte,
so prefill is in it. The warm datastore holds Redwood's own plain answers to prompts that are not
asked: of the editing set the other file, of a file every other line. A concurrency replaces its
like in the result file and leaves the others. Run it alone on a machine.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import psutil
from cases import user
from peer_tables import Turns, show, summary, verdict
from raw import Reply, Wire, parse, request
from rivals import (
    NO_MODEL_SERVER,
    Load,
    Rival,
    kept_answers,
    make_datastore,
    redwood_options,
    rivals,
)
from running import TARGET, Server, serving, setting

from common import setting as common_setting, write  # isort: skip

from redwood.models import locate
from redwood.models.tokenizer import load_tokenizer

PROMPTS = Path(__file__).parents[1] / "prompts"
CHAT = "/v1/chat/completions"
TEXT = re.compile(rb'"content": ?"[^"]')
TEMPLATE = 96  # tokens around a prompt, at most
FEWEST = 24  # requests of a measurement; with more clients, three each
LIES = 0.02  # of all tokens


async def stream(server: Server, body: dict[str, Any]) -> tuple[Reply, float | None, float]:
    """One answer, when its first text came, and when it ended."""
    start, first, received = time.perf_counter(), None, b""
    async with Wire(server) as wire:
        await wire.send(request(server, CHAT, body))
        while part := await wire.read():
            received += part
            if first is None and TEXT.search(part):
                first = time.perf_counter() - start
    return parse(received), first, time.perf_counter() - start


async def ask_all(
    server: Server, texts: Sequence[str], concurrency: int, fields: dict[str, Any]
) -> tuple[float, list[dict[str, Any]]]:
    """Seconds for all answers, so many at a time, and what is known of each, in order."""
    left, found = iter(range(len(texts))), list[dict[str, Any]]()

    async def client() -> None:
        for index in left:
            body = {"messages": [user(texts[index])], "temperature": 0, "stream": True, **fields}
            body["stream_options"] = {"include_usage": True}
            reply, first, seconds = await stream(server, body)
            found.append({"index": index, **told(reply), "first_s": first, "seconds": seconds})

    start = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(concurrency)))
    return time.perf_counter() - start, sorted(found, key=lambda each: int(each["index"]))


def told(reply: Reply) -> dict[str, Any]:
    """Text and counts of an answer; an `error` if it is none."""
    if reply.status != 200 or not reply.done or reply.error:
        return {"error": f"{reply.status} {reply.body[-300:]!r}", "text": "", "tokens": 0}
    usage: dict[str, Any] = {}
    for event in reply.events:
        usage |= event.get("usage") or {}
    found = {"text": "".join(reply.texts()), "tokens": usage.get("completion_tokens")}
    found |= {"prompt_tokens": usage.get("prompt_tokens")}
    if "redwood" in usage:
        names = ("target_passes", "num_draft_tokens", "num_accepted_tokens", "seconds")
        found["redwood"] = {name: usage["redwood"][name] for name in names}
    return found


def measure(
    server: Server, texts: Sequence[str], concurrency: int, fields: dict[str, Any], tokenizer: Any
) -> dict[str, Any]:
    """One turn of one way: speed, waits, and what others took of the processors."""
    others = Others(server)
    seconds, answers = asyncio.run(ask_all(server, texts, concurrency, fields))
    made: dict[str, Any] = {"seconds": round(seconds, 3), "others": others.share()}
    errors = [each["error"] for each in answers if "error" in each]
    recounts = [len(tokenizer.encode(each["text"], add_special_tokens=False)) for each in answers]
    counts = [each["tokens"] for each in answers]
    lies = None in counts or abs(sum(counts) - sum(recounts)) > len(texts) + LIES * sum(recounts)
    if lies:  # each answer may have an end token that is no text
        made["server_counted"], counts = counts, recounts
    made |= {"tokens": sum(counts), "tokens_per_s": round(sum(counts) / seconds, 2)}
    made |= {"recounted": sum(recounts), "errors": errors[:3], "failed": len(errors)}
    made["prompt_tokens"] = sum(each.get("prompt_tokens") or 0 for each in answers)
    whole = [
        (each, n) for each, n in zip(answers, counts, strict=True) if each["first_s"] and n > 1
    ]
    made["first_ms"] = round(1e3 * median(each["first_s"] for each, _ in whole), 1)
    later = [1e3 * (each["seconds"] - each["first_s"]) / (n - 1) for each, n in whole]
    made["per_token_ms"] = round(median(later), 2)
    own = [each["redwood"] for each in answers if "redwood" in each]
    if own:
        made["tokens_per_pass"] = round(sum(counts) / sum(e["target_passes"] for e in own), 3)
        made["drafted"] = sum(each["num_draft_tokens"] for each in own)
        made["accepted"] = sum(each["num_accepted_tokens"] for each in own)
    return made | {"texts": [each["text"] for each in answers]}


class Others:
    """How many processors anybody but this process and a server used."""

    def __init__(self, server: Server) -> None:
        assert server.process is not None
        self._processes = [psutil.Process(), server.process]
        self._start, self._before = time.perf_counter(), self._seconds()

    def _seconds(self) -> float:
        times = psutil.cpu_times()
        own = sum(sum(process.cpu_times()[:2]) for process in self._processes)
        return float(sum(times) - times.idle - times.iowait - times.guest - times.guest_nice - own)

    def share(self) -> float:
        passed = time.perf_counter() - self._start
        return round((self._seconds() - self._before) / passed, 3)


def half_sets(options: argparse.Namespace) -> tuple[list[str], list[str]]:
    """The prompts that are asked, and those whose answers the warm datastore holds."""
    if options.prompts is None:
        asked, other = (read(PROMPTS / f"editing_{half}.jsonl") for half in ("test", "dev"))
    else:
        both = read(options.prompts)
        asked, other = both[::2], both[1::2]
    return asked, spread(other, min(options.answers, len(other)))


def read(file: Path) -> list[str]:
    """The first question of each line."""
    entries = [json.loads(line) for line in file.read_text().splitlines()]
    return [entry["prompt"] if "prompt" in entry else entry["turns"][0] for entry in entries]


def spread(texts: Sequence[str], num: int) -> list[str]:
    """So many of them, from all parts; again from the start where there are fewer."""
    count = min(num, len(texts))
    chosen = [texts[i * len(texts) // count] for i in range(count)]
    return [chosen[i % count] for i in range(num)] if num > count else chosen


def run(
    taking_part: Sequence[Rival],
    load: Load,
    halves: tuple[list[str], list[str]],
    concurrency: int,
    options: argparse.Namespace,
) -> Iterator[dict[str, Any]]:
    """What is known of one concurrency after each round."""
    num = options.requests or max(FEWEST, 3 * concurrency)
    texts, warm_up = spread(halves[0], num), spread(halves[1], max(2, concurrency))
    tokenizer = load_tokenizer(locate(load.target)[0])
    turns: Turns = {n: [] for rival in taking_part for n in rival.ways}
    for turn in range(options.rounds):
        start = turn % len(taking_part)
        for rival in [*taking_part[start:], *taking_part[:start]]:
            with rival.start(concurrency) as server:
                ways = list(rival.ways.items())
                for name, fields in ways if turn % 2 == 0 else ways[::-1]:
                    asyncio.run(ask_all(server, warm_up, concurrency, {**fields, "max_tokens": 12}))
                    fields = {**fields, "max_tokens": load.max_tokens}
                    made = measure(server, texts, concurrency, fields, tokenizer)
                    turns[name].append(made)
                    shown = {k: v for k, v in made.items() if k != "texts"}
                    print(concurrency, name, shown, file=sys.stderr, flush=True)
        lines = [summary(name, turns) for name in turns]
        about = {"requests": num, "distinct_prompts": len(set(texts)), "rounds": turn + 1}
        yield {"concurrency": concurrency, **about, **verdict(turns), "lines": lines}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", default=TARGET)
    parser.add_argument("--set", default="editing", help="its name; any but editing has a file")
    parser.add_argument("--prompts", type=Path, help="JSON lines; left out: the editing set")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--rounds", type=int, default=2, help="0: only makes the datastore")
    parser.add_argument("--requests", type=int, help=f"default {FEWEST}, or three a client")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--answers", type=int, default=96, help="of the datastore, at most")
    parser.add_argument(
        "--datastore", type=Path, help="made if it is not there; default: in the cache"
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--only", nargs="+", help="servers whose names hold one of these words")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--show", type=Path, nargs="+", help="result files, as tables")
    options = parser.parse_args()
    if (options.set == "editing") != (options.prompts is None):
        parser.error("--prompts FILE and the name of its set, --set NAME, go together")
    return options


def main() -> None:
    options = arguments()
    if options.show:
        for file in options.show:
            show(json.loads(file.read_text()))
        return
    halves = half_sets(options)
    tokenizer = load_tokenizer(locate(options.target)[0])
    longest = max(len(tokenizer.encode(text)) for half in halves for text in half)
    name = f"{options.target}-{options.set}-{options.answers}-{options.max_tokens}"
    datastore = options.datastore or kept_answers(name)
    context = longest + TEMPLATE + options.max_tokens
    load = Load(options.target, options.threads, options.max_tokens, context, datastore)
    if not datastore.exists():
        with serving(redwood_options(load, "ngram")) as server:
            fields = {"redwood": {"speculate": False}, "max_tokens": options.max_tokens}
            _, answers = asyncio.run(ask_all(server, halves[1], 16, fields))
        make_datastore(load, [each["text"] for each in answers])
    if options.rounds:
        measure_all(load, halves, options)


def measure_all(
    load: Load, halves: tuple[list[str], list[str]], options: argparse.Namespace
) -> None:
    """Runs all that can take part; saves after every round."""
    taking_part, left_out = [], {"OpenVINO Model Server": NO_MODEL_SERVER}
    for rival in rivals(load):
        names = {n for n in rival.ways if any(word in n for word in options.only or ("",))}
        if names and rival.missing:
            left_out |= dict.fromkeys(names, rival.missing)
        elif names:
            taking_part.append(replace(rival, ways={n: rival.ways[n] for n in sorted(names)}))
    about = {"target": options.target, "set": options.set, "max_tokens": options.max_tokens}
    about |= {"threads": options.threads, "answers_in_datastore": len(halves[1])}
    parts = {}
    if options.json and options.json.exists():
        parts = {
            part["concurrency"]: part for part in json.loads(options.json.read_text())["parts"]
        }
    for concurrency in options.concurrency:
        for part in run(taking_part, load, halves, concurrency, options):
            parts[concurrency] = {**part, "setting": setting()}
            result = {**about, "left_out": left_out, "parts": [parts[key] for key in sorted(parts)]}
            if options.json:
                write(options.json, common_setting(), **result)
    show(result)


if __name__ == "__main__":
    main()
