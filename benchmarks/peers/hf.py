"""Transformers' `generate` as a peer: plain, with an assistant model, and by prompt lookup.

Runs in Redwood's own environment, on the folder of float weights that Redwood makes of a GGUF
file. One process has the weights once and answers all modes:

    {"do": "info"}      {"version": ..., "weights": ..., "modes": [...]}
    {"do": "generate", "mode": "lookup", "draft": 8, "ids": [...], "end_ids": [...],
     "max_tokens": m, "temperature": t}
    {"ids": [...], "first_ms": ..., "decode_ms": ..., "decoded": n, "passes": p}

`first_ms` ends with the first pass, which is the prefill; `decoded` are the tokens of all passes
after it. Drafting begins before the first pass: an assistant's prefill and the first draft are in
`first_ms`, and what the first pass accepted is in no speed.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
import transformers
from lines import Command, serve
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

LOOKUP = 8  # tokens of one draft


class Arrivals:
    """A streamer that keeps when tokens came, and how many."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.seconds: list[float] = []
        self.counts: list[int] = []

    def put(self, ids: Any) -> None:
        self.seconds.append(time.perf_counter() - self.start)
        self.counts.append(ids.numel())

    def end(self) -> None:
        pass


class Peer:
    def __init__(self, target: str, draft: str | None, dtype: str, threads: int) -> None:
        torch.set_num_threads(threads)
        transformers.logging.set_verbosity_error()
        self.dtype = dtype
        self.target: Any = self.open(target)
        self.draft: Any = None  # opened when it is first asked for
        self.draft_folder = draft
        self.stored = AutoConfig.from_pretrained(target).dtype
        self.target.generation_config = GenerationConfig()  # nothing but what a request asks for

    def open(self, folder: str) -> Any:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, self.dtype)).eval()

    def info(self, request: dict[str, Any]) -> dict[str, Any]:
        modes = ["plain", "lookup", *(["assisted"] if self.draft_folder else [])]
        stored = str(self.stored).removeprefix("torch.")
        weights = f"{self.dtype}, from Redwood's folder of the GGUF file's weights in {stored}"
        return {"version": transformers.__version__, "weights": weights, "modes": modes}

    def generate(self, request: dict[str, Any]) -> dict[str, Any]:
        ids, ends = torch.tensor([request["ids"]]), request["end_ids"]
        options: dict[str, Any] = {"max_new_tokens": request["max_tokens"], "do_sample": False}
        options |= {"eos_token_id": ends, "pad_token_id": ends[0]}
        if request["temperature"] > 0:
            options |= {"do_sample": True, "temperature": request["temperature"]}
            options |= {"top_k": 0, "top_p": 1.0}
        arrivals = Arrivals()
        made = self.target.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            streamer=arrivals,
            **options,
            **self.mode(request["mode"], request["draft"]),
        )
        whole = time.perf_counter() - arrivals.start
        first, counts = arrivals.seconds[1], arrivals.counts[2:]  # the prompt is streamed too
        answer = {"ids": made[0, ids.shape[1] :].tolist(), "first_ms": 1e3 * first}
        return answer | {
            "decode_ms": 1e3 * (whole - first),
            "decoded": sum(counts),
            "passes": len(counts),
        }

    def mode(self, name: str, draft: int | None) -> dict[str, Any]:
        if name == "plain":
            return {}
        if name == "lookup":
            return {"prompt_lookup_num_tokens": draft or LOOKUP}
        if name != "assisted" or self.draft_folder is None:
            raise ValueError(f"no mode {name!r} here")
        if self.draft is None:
            self.draft = self.open(self.draft_folder)
        if draft is not None:
            self.draft.generation_config.num_assistant_tokens = draft
        return {"assistant_model": self.draft}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", required=True)
    parser.add_argument("--draft")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()

    def load() -> dict[str, Command]:
        peer = Peer(options.target, options.draft, options.dtype, options.threads)
        return {"info": peer.info, "generate": peer.generate}

    serve(load)


if __name__ == "__main__":
    main()
