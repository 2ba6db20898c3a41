"""What a pass of a streamed mixture reads, and how long that takes, by its nodes.

Layers of Qwen3-30B-A3B's shape with random weights, written once to --folder; random tokens.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
import transformers

from redwood.backends.base import AcceptedPath, Nodes
from redwood.backends.load import load_offload

VOCABULARY = 2000


def write_model(folder: Path, layers: int, experts: int) -> None:
    """Writes the model in bfloat16, unless the folder is there."""
    if folder.exists():
        return
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=2048,
        intermediate_size=6144,
        moe_intermediate_size=768,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        num_experts=experts,
        num_experts_per_tok=8,
        norm_topk_prob=True,
        max_position_embeddings=2048,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    torch.set_default_dtype(torch.bfloat16)
    transformers.Qwen3MoeForCausalLM(config).save_pretrained(folder)
    torch.set_default_dtype(torch.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("offload_experts_model"))
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--memory", help="what the process may take, such as 2GiB; none stays")
    parser.add_argument("--nodes", type=int, nargs="+", default=[1, 2, 4, 16])
    parser.add_argument("--repeats", type=int, default=6)
    given = parser.parse_args()
    write_model(given.folder, given.layers, given.experts)
    backend = load_offload(given.folder, name=str(given.folder), memory=given.memory)
    backend.settle()
    generator = torch.Generator().manual_seed(1)
    print(f"{backend.stream.total_bytes / 1e6:.0f} MB in all")
    for nodes in given.nodes:
        row, seconds, read = backend.open(), [], []
        for _ in range(given.repeats):
            tokens = torch.randint(3, VOCABULARY, (nodes,), generator=generator).tolist()
            before, start = backend.stream.bytes_read, time.perf_counter()
            backend.extend([Nodes(row, tokens, [-1] + [0] * (nodes - 1))])
            seconds.append(time.perf_counter() - start)
            backend.commit([AcceptedPath(row, [0])])
            read.append((backend.stream.bytes_read - before) / 1e6)
        backend.release(row)
        print(
            f"{nodes:3d} nodes: {min(read):.0f} to {max(read):.0f} MB, "
            f"{min(seconds):.2f} to {max(seconds):.2f} s"
        )


if __name__ == "__main__":
    main()
