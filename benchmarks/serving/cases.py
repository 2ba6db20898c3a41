"""Known requests and their right answers, as `engine.generate` gives them.

    python benchmarks/serving/cases.py OUT.json      # what the other commands run beforehand

The answers are made in a process of their own, so that no model stays in the clients' memory; by
the drafter of the server and by plain decoding, which must agree.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROMPTS = (
    "Name three trees.",
    "Write a haiku about rain.",
    "What is 12 times 12?",
    "Repeat this line three times: the quick brown fox jumps over the lazy dog.",
    "Write `def add(a, b)` in Python, then write it again.",
    "Say good morning in French, German and Japanese, with an emoji.",
    "List the days of the week, then list them again.",
    "What does HTTP 429 mean?",
)
WAYS: tuple[dict[str, Any], ...] = (
    {"temperature": 0.0},
    {"temperature": 0.0, "stop": ["\n", ". "]},
    {"temperature": 0.0, "frequency_penalty": 0.5, "presence_penalty": 0.3},
    {"temperature": 0.8, "seed": 7},
    {"temperature": 1.0, "seed": 2**63 + 5, "top_p": 0.9, "top_k": 40},
    {"temperature": 0.7, "seed": -3, "min_p": 0.05, "repetition_penalty": 1.1},
    {"temperature": 0.6, "seed": 11, "n": 2},
)
MAX_TOKENS = (8, 20, 32)


@dataclass(frozen=True)
class Case:
    """A request of /v1/chat/completions or /v1/completions and the texts of its choices."""

    path: str
    body: dict[str, Any]
    texts: list[str]
    num_tokens: int

    def changed(self, **more: Any) -> dict[str, Any]:
        """The body with some more fields."""
        return {**self.body, **more}


def requests() -> Iterator[tuple[str, dict[str, Any]]]:
    """Path and body of every case."""
    for index, prompt in enumerate(PROMPTS):
        for turn, way in enumerate(WAYS):
            if (index + turn) % 2:  # every other pair is enough
                continue
            body = {**way, "max_tokens": MAX_TOKENS[(index + turn) // 2 % len(MAX_TOKENS)]}
            if (index + turn) % 8 == 0:
                yield "/v1/completions", {"prompt": prompt, **body}
            else:
                yield "/v1/chat/completions", {"messages": [user(prompt)], **body}


def user(text: str) -> dict[str, str]:
    """A message."""
    return {"role": "user", "content": text}


def known(target: str, drafter: str) -> list[Case]:
    """All cases with their answers."""
    with tempfile.NamedTemporaryFile(suffix=".json") as made:
        command = [sys.executable, __file__, made.name, "--target", target, "--drafter", drafter]
        subprocess.run(command, check=True)
        return [Case(**each) for each in json.loads(Path(made.name).read_text())]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--target", default="smollm2-135m-instruct")
    parser.add_argument("--drafter", default="ngram")
    options = parser.parse_args()
    import redwood

    engine = redwood.load(options.target, options.drafter, threads=1, backend="native")
    cases = []
    for path, body in requests():
        params = {k: v for k, v in body.items() if k not in ("messages", "prompt", "n")}
        prompt = body.get("messages") or body["prompt"]
        texts, tokens = [], 0
        for index in range(body.get("n", 1)):
            if "seed" in params:
                params["seed"] = (body["seed"] + index) % 2**64
            answer, plain = (
                engine.generate([prompt], **params, speculate=speculate)[0]
                for speculate in (True, False)
            )
            if answer.text != plain.text:
                raise SystemExit(f"speculation changed a text: {body}")
            texts.append(answer.text)
            tokens += len(answer.token_ids)
        cases.append({"path": path, "body": body, "texts": texts, "num_tokens": tokens})
    options.out.write_text(json.dumps(cases))


if __name__ == "__main__":
    main()
