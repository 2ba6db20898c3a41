"""OpenVINO GenAI as a peer: plain, by prompt lookup, and with a draft model.

Runs in the environment that build.py makes. The requests are hf.py's; a mode's pipeline is made
when it is first asked for. A target is a folder that build.py exported, or a GGUF file, which this
library reads by itself. Time and tokens of a pass are the library's own counts: `first_ms` is the
prefill with its token, and with a draft model that model's prefill and first draft too.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import openvino_genai as genai
from lines import Command, serve

LOOKUP, DRAFT = 5, 4  # tokens of one draft
NGRAM = 3  # longest match of prompt lookup


class Peer:
    def __init__(self, target: Path, draft: Path | None, threads: int) -> None:
        self.target, self.draft = target, draft
        self.options = {"INFERENCE_NUM_THREADS": threads}
        self.pipelines: dict[str, Any] = {}

    def info(self, request: dict[str, Any]) -> dict[str, Any]:
        modes = ["plain", "lookup", *(["draft"] if self.draft else [])]
        weights = "int4 (asymmetric, groups of 64), requantised from the file's; head int8"
        if self.target.suffix == ".gguf":
            weights = "the GGUF file's 4 bits, offsets of groups rounded; read by OpenVINO"
        return {"version": genai.__version__, "weights": weights, "modes": modes}

    def pipeline(self, mode: str) -> Any:
        if mode not in self.pipelines:
            options: dict[str, Any] = dict(self.options)
            if mode == "lookup":
                options["prompt_lookup"] = True
            elif mode == "draft" and self.draft is not None:
                options["draft_model"] = genai.draft_model(str(self.draft), "CPU", **self.options)
            elif mode != "plain":
                raise ValueError(f"no mode {mode!r} here")
            self.pipelines[mode] = genai.LLMPipeline(str(self.target), "CPU", **options)
        return self.pipelines[mode]

    def generate(self, request: dict[str, Any]) -> dict[str, Any]:
        pipeline = self.pipeline(request["mode"])
        config = settings(request)
        ids = openvino.Tensor(np.array([request["ids"]], dtype=np.int64))
        start = time.perf_counter()
        made = pipeline.generate(ids, config)
        whole = 1e3 * (time.perf_counter() - start)
        first = made.perf_metrics.get_ttft().mean
        counts = made.perf_metrics.raw_metrics.m_batch_sizes[1:]  # the first is of the prefill
        answer = {"ids": list(made.tokens[0]), "first_ms": first, "decode_ms": whole - first}
        return answer | {"decoded": sum(counts), "passes": len(counts)}


def settings(request: dict[str, Any]) -> Any:
    config = genai.GenerationConfig()
    config.apply_chat_template = False
    config.max_new_tokens = request["max_tokens"]
    config.stop_token_ids = set(request["end_ids"])
    config.do_sample = request["temperature"] > 0
    if config.do_sample:
        config.temperature, config.top_p = request["temperature"], 1.0
    if request["mode"] == "lookup":
        config.num_assistant_tokens, config.max_ngram_size = request["draft"] or LOOKUP, NGRAM
    elif request["mode"] == "draft":
        config.num_assistant_tokens = request["draft"] or DRAFT
    return config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", type=Path, required=True)
    parser.add_argument("--draft", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()

    def load() -> dict[str, Command]:
        peer = Peer(options.target, options.draft, options.threads)
        return {"info": peer.info, "generate": peer.generate}

    serve(load)


if __name__ == "__main__":
    main()
