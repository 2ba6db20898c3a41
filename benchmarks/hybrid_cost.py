"""The time of a pass of a hybrid by its tokens: t(n) of Qwen3.5-2B's shape, and what a row takes.

    python benchmarks/hybrid_cost.py --folder OUT [--layers 24] [--kind Q4_K] [--out FILE.json]

Writes a GGUF file of that model's true shape with random weights, cut to some layers and a small
vocabulary where it is told so. The shape is that of its configuration as far as it is known here:
24 layers, of which every fourth has attention (8 heads of 256, 2 of keys and values), 16 heads with
states of 128 x 128, hidden 2048, MLPs of 6144; the size of its drafting layer, 116 MiB in bf16,
agrees. Times are of chains behind a context, `extend` alone; `commit_ms` is what keeping a chain of
n nodes takes then. Memory: what `row_bytes` says of a row, and what it holds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter
from moe_cost import random_rows

from redwood.backends.base import AcceptedPath, Nodes
from redwood.backends.native.backend import NativeBackend
from redwood.backends.native.load import load_native
from redwood.backends.rows import fill
from redwood.bench.report import forward_times

HIDDEN, FFN, EVERY = 2048, 6144, 4
HEADS, KV_HEADS, HEAD_DIM = 8, 2, 256
STATES, STATE, WIDTH = 16, 128, 4
VOCABULARY = 248320


def write(path: Path, layers: int, kind: str, vocabulary: int) -> Path:
    """Writes a random model of that shape."""
    if path.exists():
        return path
    rng = np.random.default_rng(0)
    writer = GGUFWriter(path, "qwen35")
    writer.add_block_count(layers)
    writer.add_context_length(32768)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_key_length(HEAD_DIM)
    writer.add_value_length(HEAD_DIM)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(1e7)
    writer.add_rope_dimension_count(HEAD_DIM // 4)
    writer.add_ssm_conv_kernel(WIDTH)
    writer.add_ssm_state_size(STATE)
    writer.add_ssm_group_count(STATES)
    writer.add_ssm_time_step_rank(STATES)
    writer.add_ssm_inner_size(STATES * STATE)
    writer.add_uint32("qwen35.full_attention_interval", EVERY)

    def matrix(name: str, *shape: int) -> None:
        data = random_rows(rng, kind, *shape)
        writer.add_tensor(f"{name}.weight", data, raw_dtype=GGMLQuantizationType[kind])

    def floats(name: str, *shape: int, mean: float = 0.0, spread: float = 0.0) -> None:
        numbers = mean + spread * rng.standard_normal(shape)
        writer.add_tensor(name, numbers.astype(np.float32))

    matrix("token_embd", vocabulary, HIDDEN)
    floats("output_norm.weight", HIDDEN, mean=1)
    for layer in range(layers):
        at = f"blk.{layer}."
        floats(f"{at}attn_norm.weight", HIDDEN, mean=1)
        floats(f"{at}post_attention_norm.weight", HIDDEN, mean=1)
        if (layer + 1) % EVERY:
            inner = STATES * STATE
            matrix(f"{at}attn_qkv", 3 * inner, HIDDEN)
            matrix(f"{at}attn_gate", inner, HIDDEN)
            matrix(f"{at}ssm_out", HIDDEN, inner)
            floats(f"{at}ssm_alpha.weight", STATES, HIDDEN, spread=0.02)
            floats(f"{at}ssm_beta.weight", STATES, HIDDEN, spread=0.02)
            floats(f"{at}ssm_conv1d.weight", 3 * inner, WIDTH, spread=0.5)
            floats(f"{at}ssm_dt.bias", STATES)
            floats(f"{at}ssm_a", STATES, mean=-0.1)
            floats(f"{at}ssm_norm.weight", STATE, mean=1)
        else:
            matrix(f"{at}attn_q", 2 * HEADS * HEAD_DIM, HIDDEN)
            matrix(f"{at}attn_k", KV_HEADS * HEAD_DIM, HIDDEN)
            matrix(f"{at}attn_v", KV_HEADS * HEAD_DIM, HIDDEN)
            matrix(f"{at}attn_output", HIDDEN, HEADS * HEAD_DIM)
            floats(f"{at}attn_q_norm.weight", HEAD_DIM, mean=1)
            floats(f"{at}attn_k_norm.weight", HEAD_DIM, mean=1)
        matrix(f"{at}ffn_gate", FFN, HIDDEN)
        matrix(f"{at}ffn_up", FFN, HIDDEN)
        matrix(f"{at}ffn_down", HIDDEN, FFN)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def commit_ms(backend: NativeBackend, nodes: int, repeats: int) -> float:
    """Median time of keeping a chain of so many nodes."""
    row, times = backend.open(), []
    for _ in range(repeats):
        backend.extend([Nodes(row, [7] * nodes)])
        start = time.perf_counter()
        backend.commit([AcceptedPath(row, range(nodes))])
        times.append(time.perf_counter() - start)
    backend.release(row)
    return 1000 * statistics.median(times)


def memory(backend: NativeBackend, tokens: int, nodes: int) -> dict[str, float]:
    """MiB of a row of so many tokens with a tree behind them, as it is said and as it is."""
    row = backend.open()
    fill(backend, row, [7] * (tokens - nodes))
    backend.extend([Nodes(row, [7] * nodes, [-1] * nodes)])
    held = backend.cache_bytes
    backend.release(row)
    said = {"predicted": backend.row_bytes(tokens, nodes), "held": held}
    said |= {"state": backend.state_bytes, "node": backend.node_bytes}
    return {name: round(size / 2**20, 2) for name, size in said.items()}


def main() -> None:
    """Times the model and prints, or writes, what it costs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True, help="where the file is written")
    parser.add_argument("--layers", type=int, default=24, help="a multiple of 4")
    parser.add_argument("--vocabulary", type=int, default=VOCABULARY)
    parser.add_argument("--kind", choices=["Q4_K", "Q6_K", "Q8_0", "Q4_0"], default="Q4_K")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    name = f"hybrid_{options.layers}_{options.vocabulary}_{options.kind}.gguf"
    file = write(options.folder / name, options.layers, options.kind, options.vocabulary)
    backend = load_native(options.folder, file, capacity=2048)
    sizes = sorted({1, *options.sizes})
    times = forward_times(backend, sizes, context=options.context, repeats=options.repeats).ms
    found: dict[str, Any] = {
        "layers": options.layers,
        "kind": options.kind,
        "isa": backend.isa,
        "threads": backend.threads,
        "ms": {size: round(ms, 2) for size, ms in times.items()},
        "ratio": {size: round(ms / times[1], 2) for size, ms in times.items()},
        "commit_ms": {n: round(commit_ms(backend, n, options.repeats), 2) for n in sizes},
        "row_mib": memory(backend, 1024, 8),
    }
    text = json.dumps(found, indent=1)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
