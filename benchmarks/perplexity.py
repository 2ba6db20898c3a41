"""Perplexity of the native backend beside llama.cpp's, on the same GGUF file and text.

The reference computes the same weights in float32, with float32 activations, keys and values
(`weights="f32"`, `kv="f32"`); its choice of the next token is what the others are compared with.

    python benchmarks/perplexity.py --model smollm2-135m-instruct --text FILE --json out.json
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch
from common import setting
from torch import Tensor

import redwood
from native import PEER, LlamaCpp
from redwood.backends.base import AcceptedPath, Nodes
from redwood.models import gguf_path


def scored(backend: Any, ids: list[int], chunk: int) -> tuple[float, Tensor]:
    """Sum of negative log-likelihoods of ids[1:], in nats, and the most probable next tokens."""
    row, nll, best = backend.open(), 0.0, []
    for start in range(0, len(ids), chunk):
        part = ids[start : start + chunk]
        (logits,) = backend.extend([Nodes(row, part)])
        backend.commit([AcceptedPath(row, range(len(part)))])
        after = torch.tensor(ids[start + 1 : start + len(part) + 1])
        laws = logits[: len(after)].double().log_softmax(-1)
        nll -= float(laws.gather(1, after[:, None]).sum())
        best.append(logits.argmax(-1))
    backend.release(row)
    return nll, torch.cat(best)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--chunk", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-reference", action="store_true", help="leave out the float32 pass")
    parser.add_argument("--peer", type=Path, default=PEER, help="python with llama-cpp-python")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    file = gguf_path(options.model)
    native = {"backend": "native", "threads": options.threads}
    engine = redwood.load(options.model, None, kv_cache=0, **native)
    ids = engine.encode(options.text.read_text())[: options.tokens]
    found = {"redwood": scored(engine.target, ids, options.chunk)}
    peer = LlamaCpp(options.peer, file, options.threads, len(ids) + 64)
    answer = peer.ask(do="logits", ids=ids, chunk=options.chunk)
    peer.process.kill()
    found["llama.cpp"] = (answer["nll"], torch.tensor(answer["top1"]))
    if not options.no_reference:
        del engine
        exact = redwood.load(options.model, None, kv_cache=0, **native, weights="f32", kv="f32")
        found["float32"] = scored(exact.target, ids, options.chunk)

    count = len(ids) - 1
    result: dict[str, Any] = {"model": options.model, "text": options.text.name, "tokens": count}
    for name, (nll, best) in found.items():
        entry = {"perplexity": math.exp(nll / count)}
        if "float32" in found:
            same = (best[:count] == found["float32"][1][:count]).float().mean()
            entry["top1_agreement"] = round(float(same), 5)
        result[name] = entry
    result["ratio"] = result["redwood"]["perplexity"] / result["llama.cpp"]["perplexity"]
    print(json.dumps(result, indent=1))
    if options.json:
        options.json.write_text(json.dumps({**result, "setting": setting()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
