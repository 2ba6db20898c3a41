"""Records the laws of a target and a drafter along plainly decoded texts.

    python benchmarks/record.py --name qwen_0.6 --temperature 0.6 --prompts FILE.jsonl FILE.jsonl
    python benchmarks/record.py --name noisy_0.6 --target smollm2-135m-instruct --layers 30 \\
        --noise 0.1 --temperature 0.6 --prompts FILE.jsonl

Each prompt is answered by plain decoding with a seed; the drafter then reads the answer (teacher
forcing). Kept per position: the best tokens of both, and the log of the whole mass at the
temperatures 0.1 to 1.2. Records lie in the user's cache, are named and not committed. Trees leave
the recorded path: a table about whole trees needs the models again.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch
from laws import TEMPERATURES, Record
from torch import Tensor

import redwood
from redwood.backends.base import AcceptedPath, Backend, Nodes
from redwood.backends.load import open_model
from redwood.drafters.base import ModelDrafter
from redwood.sampling import History, SamplingParams, probs_from_scores, scores, top
from redwood.sampling.noise import draw

PAIR = ("target", "drafter", "layers", "noise")
_CHUNK = 512


def add_pair(parser: argparse.ArgumentParser) -> None:
    """Adds the options that name a pair of models."""
    parser.add_argument("--target", default="qwen2.5-coder-1.5b-instruct")
    parser.add_argument("--drafter", help="default: the target, with --layers and --noise")
    parser.add_argument("--layers", type=int, help="first layers of the drafter, with --noise")
    parser.add_argument("--noise", type=float, default=0.0, help="on the drafter's weights")


def add_prompts(parser: argparse.ArgumentParser, num: int, *, required: bool = True) -> None:
    """Adds the options that choose prompts."""
    parser.add_argument("--prompts", type=Path, nargs="+", required=required, help="JSONL files")
    parser.add_argument("--num", type=int, default=num, help="prompts, from all files alike")
    parser.add_argument("--low", type=int, default=30, help="fewest tokens of a prompt")
    parser.add_argument("--high", type=int, default=240, help="most tokens of a prompt")
    parser.add_argument("--half", type=int, choices=(0, 1), help="only every other prompt")


def chosen_prompts(engine: redwood.Engine, options: argparse.Namespace) -> list[list[int]]:
    """Token ids of the prompts that the options ask for."""
    step = 1 if options.half is None else 2
    share = -(-options.num // len(options.prompts))
    found = [
        common.chat_prompts(engine, file, options.low, options.high, step * share)
        for file in options.prompts
    ]
    listed = [prompt for prompts in found for prompt in prompts[options.half or 0 :: step]]
    return listed[: options.num]


@contextmanager
def open_pair(pair: dict[str, Any], threads: int) -> Iterator[redwood.Engine]:
    """An engine of the native backend whose drafter is the pair's model.

    A changed drafter is held in 8 bits: its floats would cost more than the target.
    """
    torch.set_num_threads(threads)
    how: dict[str, Any] = {"backend": "native", "threads": threads}
    drafter = pair["drafter"] or pair["target"]
    if pair["layers"] is None:
        yield redwood.load(pair["target"], drafter, kv_cache=0, **how)
        return
    with common.shallow_copy(drafter, pair["layers"], pair["noise"]) as folder:
        _, backend = open_model(folder, weights="int8", **how)
        yield redwood.load(pair["target"], ModelDrafter(backend), kv_cache=0, **how)


def command() -> str:
    """The command of this process; files stand there by their names alone."""
    words = [Path(word).name if word.endswith((".jsonl", ".json")) else word for word in sys.argv]
    return shlex.join(["python", f"benchmarks/{Path(words[0]).name}", *words[1:]])


def fill(backend: Backend, row: int, tokens: Sequence[int]) -> None:
    """Commits tokens to a row, a chunk at a time."""
    for start in range(0, len(tokens), _CHUNK):
        chunk = tokens[start : start + _CHUNK]
        backend.extend([Nodes(row, chunk, num_logits=1)])
        backend.commit([AcceptedPath(row, range(len(chunk)))])


def answer(
    engine: redwood.Engine, prompt: list[int], params: SamplingParams, rng: np.random.Generator
) -> tuple[list[int], Tensor]:
    """Plain decoding: the new tokens, and the target's logits [tokens, V] for them."""
    target, row = engine.target, engine.target.open()
    fill(target, row, prompt[:-1])
    tokens, rows = prompt[-1:], []
    while len(tokens) <= params.max_tokens and tokens[-1] not in engine.eos_ids:
        (logits,) = target.extend([Nodes(row, tokens[-1:])])
        target.commit([AcceptedPath(row, [0])])
        rows.append(logits[0].clone())
        law = probs_from_scores(scores(rows[-1], params, History(prompt)), params)
        tokens.append(draw(law.numpy(), float(rng.random())))
    target.release(row)
    return tokens[1:], torch.stack(rows)


def forced(backend: Backend, text: list[int], count: int) -> Tensor:
    """Logits [count, V] for the last `count` tokens of a text."""
    row = backend.open()
    fill(backend, row, text[: -count - 1])
    (logits,) = backend.extend([Nodes(row, text[-count - 1 : -1])])
    backend.release(row)
    return logits


def masses(logits: Tensor) -> np.ndarray:
    """Log of the sum of exp(logit / temperature), [tokens, temperatures]."""
    columns = [torch.logsumexp(logits.double() / t, -1) for t in TEMPERATURES]
    return torch.stack(columns, -1).numpy()


def position_arrays(target: Tensor, draft: Tensor, width: int, order: int) -> dict[str, np.ndarray]:
    """What a record keeps of logits [tokens, V]."""
    draft = draft[:, : target.shape[1]]
    target_logits, target_ids = top(target, order)
    draft_logits, draft_ids = top(draft, width)
    return {
        "target_logits": target_logits.numpy(),
        "target_ids": target_ids.numpy().astype(np.int32),
        "draft_logits": draft_logits.numpy(),
        "draft_ids": draft_ids.numpy().astype(np.int32),
        "target_at_draft": target.gather(1, draft_ids).numpy(),
        "target_mass": masses(target),
        "draft_mass": masses(draft),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--name", required=True, help="of the record")
    add_pair(parser)
    add_prompts(parser, 24)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=0.6)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--width", type=int, default=64, help="tokens that the drafter draws from")
    parser.add_argument("--order", type=int, default=1024, help="tokens of the target, for top-p")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    params = SamplingParams(max_tokens=options.max_tokens, temperature=options.temperature)
    pair = {name: getattr(options, name) for name in PAIR}
    parts: list[dict[str, np.ndarray]] = []
    texts, lengths = [], []
    with open_pair(pair, options.threads) as engine:
        drafter: Any = engine.drafter
        for i, prompt in enumerate(chosen_prompts(engine, options)):
            start, rng = time.time(), np.random.default_rng([options.seed, i])
            new, target = answer(engine, prompt, params, rng)
            draft = forced(drafter.backend, [*prompt, *new], len(new))
            part = position_arrays(target, draft, options.width, options.order)
            part["prompts"] = np.full(len(new), i)
            part["places"] = len(prompt) + np.arange(len(new))
            parts.append(part)
            texts.append([*prompt, *new])
            lengths.append(len(prompt))
            vocab_size = engine.target.vocab_size
            print(f"{i}: {len(prompt)} + {len(new)} tokens, {time.time() - start:.0f} s")
    asked = {"temperature": options.temperature, "seed": options.seed, "width": options.width}
    facts = {"pair": pair, "vocab_size": vocab_size, **asked, **common.setting(command=command())}
    record = Record(
        tokens=np.concatenate([np.array(text, np.int32) for text in texts]),
        ends=np.cumsum([len(text) for text in texts]),
        prompt_lengths=np.array(lengths),
        **{name: np.concatenate([part[name] for part in parts]) for name in parts[0]},
        facts=facts,
    )
    print(record.save(options.name), len(record.places), "positions")


if __name__ == "__main__":
    main()
