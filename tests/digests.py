"""What every machine must say, as SHA-256 digests of logits, of texts, and of what they come from.

`python tests/digests.py` (`make digests`) compares each instruction set of this machine
with tests/data/digests.json, and exits with status 1 where anything differs. `--write` makes the
file anew, if all instruction sets here agree.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import sys
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bits_kit import KINDS, Made, instruction_sets, logits_of, made_spec, raw
from decoder_kit import CLASSES
from redwood import models
from redwood.backends.native.load import load_native
from redwood.backends.native.rope import make_rope
from redwood.drafters.base import NgramDrafter
from redwood.engine.text import Engine
from redwood.errors import ModelError
from redwood.models.tokenizer import eos_ids, load_tokenizer
from redwood.profiling.key import _processor
from redwood.sampling import kernels
from redwood.sampling.noise import coupled_choice, gumbel

FILE = Path(__file__).parent / "data" / "digests.json"
MODEL = "smollm2-135m-instruct"
WAYS = {
    **{kind: (kind, "auto", "f16") for kind in KINDS},
    **{f"F32 as {made}": ("F32", made, "f16") for made in ("bf16", "int8", "int4", "draft")},
    "Q4_K as f32": ("Q4_K", "f32", "f16"),
    "Q4_0, keys f32": ("Q4_0", "auto", "f32"),
}
"""Kinds of weights: that of the file, what is made of it, that of keys and values."""
SAMPLING: dict[str, dict[str, Any]] = {
    "temperature 0": {"temperature": 0.0},
    "temperature 0.8, seed 7": {"temperature": 0.8, "seed": 7},
    "top-p 0.9, penalties, seed 8": {
        "temperature": 1.0,
        "top_p": 0.9,
        "seed": 8,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.5,
    },
}
PROMPTS = (
    "Copy this twice: a rose is a rose is a rose is a rose.",
    "def add(a, b):\n    return a + b\n\ndef add_three(a, b, c):\n    return",
    "Name three trees, and say one thing about each.",
)
TOKENS = 24  # of each text
Digests = dict[str, str]


def digest(data: NDArray[Any] | str) -> str:
    """SHA-256 of a text, or of numbers in little-endian order."""
    if isinstance(data, str):
        return hashlib.sha256(data.encode()).hexdigest()
    return hashlib.sha256(data.astype(data.dtype.newbyteorder("<")).tobytes()).hexdigest()


def of_libraries() -> Digests:
    """Of what is computed outside the kernels: rotary frequencies, weights of tokens and noise."""
    return {"rotary frequencies": _rotary(), "noise and choices": _chance()}


def _rotary() -> str:
    found: list[float] = []
    trained = {"original_max_position_embeddings": 8192}
    stretch = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    for dim in (32, 64, 80, 96, 128, 256):
        divisors = {"short_factor": [1 + i / 7 for i in range(dim // 2)]}
        divisors["long_factor"] = [3 + i / 3 for i in range(dim // 2)]
        for theta in (10_000.0, 100_000.0, 500_000.0, 1e6, 5e6):
            for scaling in (
                {"rope_type": "default"},
                {"rope_type": "linear", "factor": 8.0},
                {"rope_type": "llama3", "factor": 8.0, **stretch, **trained},
                {"rope_type": "yarn", "factor": 4.0, **trained},
                {"rope_type": "yarn", "factor": 40.0, "truncate": False, **trained},
                {"rope_type": "longrope", **divisors, **trained},
            ):
                parameters = {**scaling, "rope_theta": theta}
                rope = make_rope(parameters, dim, context=131072, capacity=None, where=FILE)
                found += [*rope.inv_freq, rope.attention_factor]
    return digest(np.array(found, np.float32))


def _chance() -> str:
    row = ((raw("row", 5000) >> np.uint64(48)).astype(np.float32) - 2**15) * np.float32(2.0**-11)
    found = []
    for position, temperature in enumerate((0.3, 0.8, 1.7)):
        weights, mass = kernels.weigh(row, float(row.max()), temperature)
        mass = kernels.truncate(weights, mass, 400, 0.95, 0.001)
        noise = gumbel(kernels.uniforms_at(7, position, np.arange(len(row))))
        choice = coupled_choice(weights / mass, noise)
        found += [weights, noise, np.array([mass, choice])]
    return digest(np.concatenate(found))


@lru_cache(maxsize=len(WAYS))
def made(family: str, way: str) -> Made:
    """A tiny model of a family and a kind of weights."""
    kind, weights, _ = WAYS[way]
    return Made.of(made_spec(family), kind, weights)


def of_family(family: str, isa: str) -> Digests:
    """Of the logits of a family's tiny models."""
    return {
        f"{family}, {way}": digest(logits_of(made(family, way).backend(isa, kv)))
        for way, (_, _, kv) in WAYS.items()
    }


def of_model(isa: str) -> Digests:
    """Of SmolLM2's logits and texts. One text has one digest, whatever drafts and in any batch.

    Raises: ModelError if the model cannot be had.
    """
    folder, file = models.locate(MODEL, progress=False)
    backend = load_native(folder, file, isa=isa, name=MODEL)
    found = {"SmolLM2, logits": digest(logits_of(backend, prompt=300, scored=3))}
    tokenizer = load_tokenizer(folder)
    ends = eos_ids(folder, tokenizer)
    for name, params in SAMPLING.items():
        for drafter in (None, NgramDrafter()):
            engine = Engine(backend, drafter, tokenizer=tokenizer, eos_ids=ends, budget=5)
            alone = [engine.generate(prompt, max_tokens=TOKENS, **params) for prompt in PROMPTS]
            batch = engine.generate(list(PROMPTS), max_tokens=TOKENS, **params)
            drafts = "none" if drafter is None else "ngram"
            for way, outputs in (("alone", alone), ("batch of 3", batch)):
                texts = json.dumps([output.text for output in outputs])
                found[f"SmolLM2, {name}, {drafts}, {way}"] = digest(texts)
    return found


def split_texts(found: Mapping[str, str]) -> list[str]:
    """The ways of sampling whose text depends on what drafts or on the batch."""
    texts = {s: {d for n, d in found.items() if n.startswith(f"SmolLM2, {s},")} for s in SAMPLING}
    return [name for name, digests in texts.items() if len(digests) > 1]


def expected() -> Digests:
    """What tests/data/digests.json says."""
    return dict(json.loads(FILE.read_text()))


def _measured(say: Callable[[str], None]) -> tuple[dict[str, Digests], bool]:
    """All digests by instruction set, and whether the real model is among them."""
    common, whole, found = of_libraries(), True, {}
    for isa in instruction_sets():
        say(isa)
        found[isa] = dict(common)
        for family in CLASSES:
            found[isa] |= of_family(family, isa)
        try:
            found[isa] |= of_model(isa) if whole else {}
        except ModelError as error:
            whole = False
            say(f"SmolLM2 is left out: {error}")
    return found, whole


def _table(wanted: Digests, found: Mapping[str, Digests]) -> list[str]:
    """Lines: what, its digest as it should be, and each instruction set's."""
    names = list(dict.fromkeys(name for each in (wanted, *found.values()) for name in each))
    width = max(map(len, names))
    lines = [f"{'what':{width}}  {'expected':12}" + "".join(f"  {isa:12}" for isa in found)]
    for name in names:
        cells = [wanted.get(name, "none")[:12]]
        for digests in found.values():
            here = digests.get(name, "not run")
            cells.append("same" if here == wanted.get(name) else here[:12])
        lines.append(f"{name:{width}}" + "".join(f"  {cell:12}" for cell in cells))
    return [line.rstrip() for line in lines]


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="make tests/data/digests.json anew")
    write = parser.parse_args(arguments).write
    print(f"{_processor()}, {platform.machine()}, {platform.system()}")
    print(
        f"Python {platform.python_version()}, NumPy {np.__version__}, PyTorch {torch.__version__}"
    )
    print(f"instruction sets: {', '.join(instruction_sets())}")
    found, whole = _measured(lambda line: print(f"  {line}", file=sys.stderr, flush=True))
    first = next(iter(found.values()))
    if write:
        faults = [] if whole else ["SmolLM2 could not be run"]
        faults += [f"{isa} differs" for isa, digests in found.items() if digests != first]
        faults += [f"texts differ by drafter or batch: {name}" for name in split_texts(first)]
        if not faults:
            FILE.write_text(json.dumps(first, indent=1) + "\n")
            print(f"{len(first)} digests written to {FILE}")
            return 0
        print("\n".join(_table(first, found)))
        print(f"not written: {'; '.join(faults)}")
        return 1
    wanted = expected()
    if not whole:
        wanted = {name: each for name, each in wanted.items() if not name.startswith("SmolLM2")}
    print("\n".join(_table(wanted, found)))
    wrong = {isa: sum(d.get(n) != e for n, e in wanted.items()) for isa, d in found.items()}
    for isa, count in wrong.items():
        print(f"{isa}: " + (f"{count} of {len(wanted)} differ" if count else "all the same"))
    return int(any(wrong.values()))


if __name__ == "__main__":
    sys.exit(main())
