"""What the benchmark commands share: prompts, a shallow drafter, and where results go."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers

import redwood
from redwood.models import resolve

RESULTS = Path(__file__).parent / "results"


def chat_prompts(engine: redwood.Engine, file: Path, low: int, high: int, count: int) -> list[Any]:
    """Token ids of `count` chat prompts of a JSONL file with `low` to `high` tokens.

    Longer prompts are cut at their end, so that text to summarise is not left out.
    """
    found = []
    for line in file.read_text().splitlines():
        data = json.loads(line)
        text = data["prompt"] if "prompt" in data else data["turns"][0]
        ids = engine.encode([{"role": "user", "content": text}])
        if len(ids) > high:
            short = engine.tokenizer.decode(engine.encode(text)[: high - 60])
            ids = engine.encode([{"role": "user", "content": short}])
        if low <= len(ids) <= high:
            found.append(ids)
    if len(found) < count:
        raise SystemExit(f"{file} has {len(found)} prompts of {low} to {high} tokens, not {count}")
    return found[:: len(found) // count][:count]  # from all parts of the file


@contextmanager
def shallow_copy(target: str, layers: int, noise: float = 0.0) -> Iterator[str]:
    """A folder with the first layers of a model, its norm and output layer: a weak drafter.

    With all layers and some noise (in units of a weight's spread) it is a good one that errs.
    """
    folder = resolve(target)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.model.layers = model.model.layers[:layers]
    model.config.num_hidden_layers = layers
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters() if noise else ():
            weight.add_(torch.randn_like(weight) * noise * weight.std())
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    with tempfile.TemporaryDirectory() as made:
        model.save_pretrained(made)
        tokenizer.save_pretrained(made)
        del model
        yield made


def setting(**more: Any) -> dict[str, Any]:
    """Hardware, versions and commit, for a result file."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    cpu = next(
        (
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    return {
        "commit": commit,
        "cpu": cpu,
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        **more,
    }


def save(name: str, data: Any) -> None:
    """Writes benchmarks/results/NAME.json."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(data, indent=1) + "\n")


def command() -> str:
    """The command line; a file of one machine is named, not where it lies there."""
    return shlex.join(Path(word).name if os.path.isabs(word) else word for word in sys.argv)


def write(path: Path, about: dict[str, Any], **values: Any) -> None:
    """Writes a result where the caller wants it, with its command and `setting`."""
    saved = {"command": command(), "setting": about, **values}
    path.write_text(json.dumps(saved, indent=1, default=_plain) + "\n")


def _plain(value: Any) -> str:
    """A path by its name alone: folders of this machine are nobody's business."""
    return value.name if isinstance(value, Path) else str(value)
