"""Time to first token of an agent's turns: a history that grows, with and without what stays.

    python benchmarks/agent_history.py [--target NAME] [--turns 20] [--tool-tokens 500]
        [--plot FILE.png] [--json FILE] [--llama-cpp URL]

Each turn sends the whole history and 500 tokens more, the output of a tool, and gets 24 tokens. Two
times some early message is changed, as agents do that shorten what they said: all behind it is then
read again. The same ids go to both engines, turn by turn in turns. With --llama-cpp they go to a
llama.cpp server (`/completion`, `cache_prompt`) that serves the same file, too.
"""

from __future__ import annotations

import argparse
import json
import urllib.request
from pathlib import Path
from time import perf_counter

import redwood
from redwood.engine.text import Engine
from redwood.sampling import SamplingParams

ANSWER = 24
CHANGES = {8: 3, 14: 6}  # at this turn, the output of that one is another
NAMES = ("tests", "build", "search", "read", "lint")


def tool_output(engine: Engine, turn: int, tokens: int, changed: bool) -> list[int]:
    """So many tokens of what a tool may say."""
    tool = NAMES[turn % len(NAMES)]
    lines = [f"\n\n{'Summary of' if changed else 'Output of'} {tool}, call {turn}:\n"]
    lines += [
        f"{tool}/{turn}_{i}.py:{i * 37 % 211}: {'ok' if i % 5 else 'failed'} in {i * 7 % 90} ms"
        for i in range(tokens)
    ]
    return list(engine.encode("\n".join(lines)))[:tokens]


def first_token(engine: Engine, prompt: list[int]) -> tuple[float, list[int], int]:
    """Seconds to the first token, the answer, and tokens that were not read again."""
    start, first, said = perf_counter(), 0.0, list[int]()
    key = engine.add(prompt, SamplingParams(max_tokens=ANSWER, temperature=0, ignore_eos=True))
    stats = engine.stats(key)
    while engine.busy:
        for step in engine.step():
            first = first or perf_counter() - start
            said += step.token_ids
    return first, said, stats.num_cached_tokens


def of_llama_cpp(url: str, prompt: list[int]) -> float:
    """Seconds until a llama.cpp server's first token."""
    body = {"prompt": prompt, "n_predict": 1, "temperature": 0, "cache_prompt": True}
    request = urllib.request.Request(
        f"{url}/completion", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    start = perf_counter()
    with urllib.request.urlopen(request) as response:
        response.read()
    return perf_counter() - start


def plot(path: Path, rows: list[dict[str, float]]) -> None:
    """Draws the time to first token by turn."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 3.6))
    for name, label in (
        ("without_s", "read each time"),
        ("with_s", "kept"),
        ("llama_cpp_s", "llama.cpp's server"),
    ):
        if name in rows[0]:
            axes.plot([r["turn"] for r in rows], [r[name] for r in rows], marker=".", label=label)
    for row in rows:
        if row["changed"]:
            axes.axvline(row["turn"], color="0.8", zorder=0)
    axes.set_yscale("log")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("turn (500 tokens more each; grey: an early message was changed)")
    axes.set_ylabel("seconds to the first token")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Runs the turns; prints a line of JSON each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", default="smollm2-135m-instruct")
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--tool-tokens", type=int, default=500)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--llama-cpp", metavar="URL")
    given = parser.parse_args()
    capacity = (given.turns + 1) * (given.tool_tokens + ANSWER + 40)
    how = dict(drafter="ngram", budget=4, backend="native")
    with_, without = (redwood.load(given.target, kv_cache=size, **how) for size in ("2GiB", 0))
    capacity = min(capacity, with_.target.capacity)
    history = [list(with_.encode("You are an agent. Tools tell you what they found."))]
    rows = []
    for turn in range(1, given.turns + 1):
        if turn in CHANGES:
            at = 2 * CHANGES[turn] - 1
            history[at] = tool_output(with_, CHANGES[turn], given.tool_tokens // 2, True)
        history.append(tool_output(with_, turn, given.tool_tokens, False))
        prompt = [token for part in history for token in part]
        if len(prompt) + ANSWER > capacity:
            print(f"the context of {capacity} tokens is full")
            break
        kept_s, said, cached = first_token(with_, prompt)
        read_s, plain, _ = first_token(without, prompt)
        assert said == plain, "an answer changed"
        row = {
            "turn": turn,
            "changed": turn in CHANGES,
            "tokens": len(prompt),
            "cached": cached,
            "without_s": round(read_s, 4),
            "with_s": round(kept_s, 4),
        }
        if given.llama_cpp:
            row["llama_cpp_s"] = round(of_llama_cpp(given.llama_cpp, prompt), 4)
        rows.append(row)
        print(json.dumps(row), flush=True)
        history.append(said)
    if given.json:
        given.json.write_text(json.dumps(rows, indent=1) + "\n")
    if given.plot:
        plot(given.plot, rows)


if __name__ == "__main__":
    main()
