"""The time of a pass of a mixture of experts by its tokens: t(n) of Qwen3-30B-A3B's layers.

    python benchmarks/moe_cost.py --folder OUT [--layers 4] [--kind Q4_K] [--peer] [--out FILE.json]

Writes a GGUF file of that model's true shape with random weights, cut to some layers and a small
vocabulary, so that the layers are what is timed, and one as wide whose MLP is dense and reads as
many bytes for a token as the chosen experts do. Both are timed in turns, chains behind a context,
with --peer beside llama.cpp on the same file of the mixture (peers/build.py bindings).
Random routers spread tokens evenly over the experts; those of a trained model see neighbouring
tokens more alike, so that these times are the worst case. `experts`: how many different ones n such
tokens reach in a layer, count * (1 - (1 - used / count) ** n).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from common import setting
from gguf import GGMLQuantizationType, GGUFWriter
from numpy.typing import NDArray

from native import PAUSE, PEER, LlamaCpp, step_ms
from redwood.backends.native.load import load_native
from redwood.backends.rows import fill

SHAPE = {"hidden": 2048, "heads": 32, "kv_heads": 4, "head_dim": 128, "experts": 128, "used": 8}
WIDTH = 768  # of an expert
VOCABULARY = 1024
Times = dict[str, dict[int, list[float]]]
_SCALES = {"Q4_K": 0, "Q6_K": 208, "Q8_0": 0, "Q4_0": 0}


def random_rows(rng: np.random.Generator, kind: str, *shape: int) -> NDArray[np.uint8]:
    """Blocks of a kind [..., rows, bytes of a row], any bits but for scales near 0.0005.

    Their mean is about 0: else all tokens were alike, and chose the same experts.
    """
    step, size = gguf.GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    blocks = rng.integers(0, 256, (*shape[:-1], shape[-1] // step, size), dtype=np.uint8)
    scales, at = rng.uniform(3e-4, 6e-4, (*blocks.shape[:-1], 1)), _SCALES[kind]
    blocks[..., at : at + 2] = scales.astype(np.float16).view(np.uint8)
    if kind == "Q4_K":  # minima of the size of the mean of 0 to 15
        blocks[..., 2:4] = (7.5 * scales).astype(np.float16).view(np.uint8)
    return blocks.reshape(*shape[:-1], -1)


def write(path: Path, layers: int, kind: str, mixture: bool) -> Path:
    """Writes a random model of that shape; its MLPs are dense where `mixture` is not."""
    if path.exists():
        return path
    rng = np.random.default_rng(0)
    architecture = "qwen3moe" if mixture else "qwen3"
    hidden, width = SHAPE["hidden"], WIDTH * SHAPE["used"]
    writer = GGUFWriter(path, architecture)
    writer.add_block_count(layers)
    writer.add_context_length(4096)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(width)
    writer.add_head_count(SHAPE["heads"])
    writer.add_head_count_kv(SHAPE["kv_heads"])
    writer.add_key_length(SHAPE["head_dim"])
    writer.add_value_length(SHAPE["head_dim"])
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(1e6)
    writer.add_tokenizer_model("no_vocab")  # as llama.cpp names a file without one
    writer.add_vocab_size(VOCABULARY)
    if mixture:
        writer.add_expert_count(SHAPE["experts"])
        writer.add_expert_used_count(SHAPE["used"])
        writer.add_expert_feed_forward_length(WIDTH)

    def matrix(name: str, *shape: int) -> None:
        data = random_rows(rng, kind, *shape)
        writer.add_tensor(f"{name}.weight", data, raw_dtype=GGMLQuantizationType[kind])

    def vector(name: str, size: int) -> None:
        writer.add_tensor(f"{name}.weight", np.ones(size, np.float32))

    matrix("token_embd", VOCABULARY, hidden)
    matrix("output", VOCABULARY, hidden)
    vector("output_norm", hidden)
    queries, keys = (SHAPE[n] * SHAPE["head_dim"] for n in ("heads", "kv_heads"))
    for layer in range(layers):
        at = f"blk.{layer}."
        vector(f"{at}attn_norm", hidden)
        vector(f"{at}ffn_norm", hidden)
        vector(f"{at}attn_q_norm", SHAPE["head_dim"])
        vector(f"{at}attn_k_norm", SHAPE["head_dim"])
        matrix(f"{at}attn_q", queries, hidden)
        matrix(f"{at}attn_k", keys, hidden)
        matrix(f"{at}attn_v", keys, hidden)
        matrix(f"{at}attn_output", hidden, queries)
        if mixture:
            router = rng.standard_normal((SHAPE["experts"], hidden)).astype(np.float32)
            writer.add_tensor(f"{at}ffn_gate_inp.weight", router / 20)
            matrix(f"{at}ffn_gate_exps", SHAPE["experts"], WIDTH, hidden)
            matrix(f"{at}ffn_up_exps", SHAPE["experts"], WIDTH, hidden)
            matrix(f"{at}ffn_down_exps", SHAPE["experts"], hidden, WIDTH)
        else:
            matrix(f"{at}ffn_gate", width, hidden)
            matrix(f"{at}ffn_up", width, hidden)
            matrix(f"{at}ffn_down", hidden, width)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def timed(steps: dict[str, Callable[[int], float]], sizes: list[int], repeats: int) -> Times:
    """Milliseconds of each step of each size [repeats], in turns; a first turn does not count."""
    times: Times = {name: {size: [] for size in sizes} for name in steps}
    for turn in range(-1, repeats):
        for size in sizes:
            for name, step in steps.items():
                time.sleep(PAUSE)
                ms = step(size)
                if turn >= 0:
                    times[name][size].append(ms)
    return times


def llama_step(
    python: Path, file: Path, threads: int, ids: list[int], tokens: list[int]
) -> Callable[[int], float]:
    """What times llama.cpp on so many of the tokens behind the others of `ids`."""
    peer = LlamaCpp(python, file, threads, len(ids) + 64)
    peer.ask(do="prefill", ids=ids[: -len(tokens)])
    return lambda n: float(peer.ask(do="step", nodes=n, repeat=1, ids=tokens[:n])["ms"][0])


def main() -> None:
    """Times the models and prints, or writes, what they cost."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True, help="where the files are written")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--kind", choices=sorted(_SCALES), default="Q4_K")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 2, 3, 4, 6, 8, 16, 32, 64])
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--peer", nargs="?", const=PEER, type=Path, help="python with llama-cpp-python"
    )
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    sizes = sorted({1, *options.sizes})
    ids = np.random.default_rng(1).integers(0, VOCABULARY, options.context + sizes[-1]).tolist()
    tokens = ids[options.context :]
    steps: dict[str, Callable[[int], float]] = {}
    found: dict[str, Any] = {"layers": options.layers, "kind": options.kind}
    for name in ("mixture", "dense"):
        file = options.folder / f"{name}_{options.layers}_{options.kind}.gguf"
        write(file, options.layers, options.kind, name == "mixture")
        backend = load_native(options.folder, file, capacity=1024, threads=options.threads)
        found |= {"isa": backend.isa, "threads": backend.threads}
        row = backend.open()
        fill(backend, row, ids[: options.context])
        steps[name] = lambda n, b=backend, r=row: step_ms(b, r, tokens[:n])  # type: ignore[misc]
        if name == "mixture" and options.peer:
            steps["llama.cpp"] = llama_step(options.peer, file, options.threads, ids, tokens)
    for name, listed in timed(steps, sizes, options.repeats).items():
        one = statistics.median(listed[1])
        found[name] = {
            size: {
                "ms_per_layer": round(statistics.median(ms) / options.layers, 3),
                "least": round(min(ms) / options.layers, 3),
                "ratio": round(statistics.median(ms) / one, 2),
            }
            for size, ms in listed.items()
        }
        found.setdefault("all_ms", {})[name] = listed
    if options.peer:
        pairs = {
            n: zip(*(found["all_ms"][x][n] for x in ("mixture", "llama.cpp")), strict=True)
            for n in sizes
        }
        found["to_llama_cpp"] = {
            n: round(statistics.median(a / b for a, b in pair), 3) for n, pair in pairs.items()
        }
    share = 1 - SHAPE["used"] / SHAPE["experts"]
    found["experts"] = {n: round(SHAPE["experts"] * (1 - share**n), 1) for n in sizes}
    found["setting"] = setting()
    if options.out:
        options.out.write_text(json.dumps(found, indent=1) + "\n")
    del found["all_ms"]
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
