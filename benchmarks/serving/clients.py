"""Programs that people use, against the server: one table.

    python benchmarks/serving/clients.py               # makes the environments, runs all
    python benchmarks/serving/clients.py --only llm    # one of them

Python clients get environments of their own under the user's cache, from `clients/*.txt` (every
version pinned; LiteLLM's file with its hash besides), Node's client a folder there. Answers must be
the texts of `engine.generate`; after a cancelled request its row must be free within two seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cases import Case, known
from running import Server, add_server, save, serving, setting

HERE = Path(__file__).parent / "clients"
RESULT = Path(__file__).parents[1] / "results" / "serving_clients.json"
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "redwood-peers"
PYTHON = {  # name -> requirements, script
    "openai (Python)": ("clients", "with_openai.py"),
    "openai 1.x (Python)": ("openai1", "with_openai.py"),
    "langchain-openai": ("clients", "with_langchain.py"),
    "litellm": ("litellm", "with_litellm.py"),
    "llm": ("clients", "with_llm.py"),
}
NODE = "openai (Node)"
CHECKS = ("plain", "stream", "usage", "stop", "error", "bad key", "cancel")


def environment(name: str) -> Path:
    """The Python of an environment, made from `clients/NAME.txt` if it is not there yet."""
    folder, file = CACHE / f"serving-{name}", HERE / f"{name}.txt"
    python, made = folder / "bin" / "python", folder / "made-from.txt"
    if not made.exists() or made.read_text() != file.read_text():
        shutil.rmtree(folder, ignore_errors=True)
        venv.create(folder, with_pip=True)
        install = [python, "-m", "pip", "install", "-qq", "--no-deps", "-r", file]
        subprocess.run(install, check=True)
        made.write_text(file.read_text())
    return python


def node_folder() -> Path:
    """A folder with Node's client."""
    folder, file = CACHE / "serving-node", HERE / "package.json"
    made = folder / "made-from.json"
    if not made.exists() or made.read_text() != file.read_text():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for name in ("package.json", "package-lock.json"):
            shutil.copy(HERE / name, folder / name)
        install = ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--silent"]
        subprocess.run(install, cwd=folder, check=True)
        made.write_text(file.read_text())
    return folder


def facts(server: Server, cases: Sequence[Case], model: str) -> dict[str, Any]:
    """What the clients are to ask, and what they must get."""
    chats = [case for case in cases if "messages" in case.body]
    greedy = [case for case in chats if case.body["temperature"] == 0.0]

    def fields(case: Case) -> set[str]:
        return set(case.body) - {"messages"}

    def best(found: list[Case]) -> dict[str, Any]:
        return vars(max(found, key=lambda case: case.num_tokens))

    return {
        "url": server.url,
        "key": server.key,
        "model": model,
        "plain": best([case for case in greedy if fields(case) == {"temperature", "max_tokens"}]),
        "stop": best(
            [c for c in greedy if "stop" in c.body and c.num_tokens < c.body["max_tokens"]]
        ),
        "seeded": best([case for case in chats if "n" in case.body]),
    }


def run(name: str, told: dict[str, Any]) -> dict[str, Any]:
    """Version and checks of a client."""
    given = {**os.environ, "REDWOOD_FACTS": json.dumps(told), "PYTHONPATH": str(HERE)}
    if name == NODE:
        folder = node_folder()
        command, folder = ["node", str(HERE / "with_openai.mjs")], folder
    else:
        requirements, script = PYTHON[name]
        command, folder = [str(environment(requirements)), str(HERE / script)], HERE
    done = subprocess.run(
        command, cwd=folder, env=given, stdout=subprocess.PIPE, text=True, timeout=600, check=False
    )
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    found: dict[str, Any] = {"version": "?", "checks": {}, "exit_code": done.returncode}
    for line in lines:
        if "version" in line:
            found["version"] = line["version"]
        else:
            found["checks"][line["check"]] = {"ok": line["ok"], "note": line["note"]}
    return found


def show(results: dict[str, dict[str, Any]]) -> None:
    """Prints the table, and what failed."""
    print("| client | " + " | ".join(CHECKS) + " | more |")
    print("| --- |" + " --- |" * (len(CHECKS) + 1))
    for name, found in results.items():
        checks = found["checks"]
        cells = [_cell(checks.get(check)) for check in CHECKS]
        more = [f"{check}: {_cell(checks[check])}" for check in checks if check not in CHECKS]
        print(f"| {name} {found['version']} | {' | '.join(cells)} | {', '.join(more)} |")
    for name, found in results.items():
        for check, told in found["checks"].items():
            if not told["ok"] or told["note"]:
                print(f"{name}, {check}: {told['note']}")


def _cell(told: dict[str, Any] | None) -> str:
    return "-" if told is None else "ok" if told["ok"] else "FAILS"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_server(parser)
    names = [*PYTHON, NODE]
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="CLIENT")
    options = parser.parse_args()
    for name in options.only:
        node_folder() if name == NODE else environment(PYTHON[name][0])
    cases = known(options.target, options.drafter)
    results = {}
    with serving(options) as server:
        told = facts(server, cases, options.target)
        for name in options.only:
            results[name] = run(name, told)
        idle_s = server.idle_within(5)
        trouble = server.log_lines("Traceback", " error ", " critical ")
    kept = json.loads(RESULT.read_text())["clients"] if RESULT.exists() else {}
    for found in results.values():
        found["setting"] = setting()
    kept |= results
    save("clients", {"clients": {name: kept[name] for name in names if name in kept}})
    show(results)
    print(f"idle after {idle_s} s; server log: {trouble or 'nothing wrong'}")
    failed = [n for n, f in results.items() if f["exit_code"] or not f["checks"]]
    failed += [n for n, f in results.items() if not all(c["ok"] for c in f["checks"].values())]
    sys.exit(1 if failed or idle_s is None else 0)


if __name__ == "__main__":
    main()
