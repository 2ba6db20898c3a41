"""Models with Mamba-2 layers: Transformers' logits, and the same bits in any company."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_families import check_logits
from test_native import check_bitwise, folder_of

from mambas_gguf import GGUF, save_mamba
from mambas_kit import MAMBAS, mamba_model
from redwood.backends.base import Nodes
from redwood.backends.native.load import load_native

pytest.importorskip("redwood._native", reason="installed without a compiler")


@pytest.mark.parametrize("name", MAMBAS)
def test_a_folder_gives_the_logits_of_transformers(name: str, tmp_path: Path) -> None:
    model = mamba_model(name)
    check_logits(load_native(folder_of(tmp_path, model), None, kv="f32", threads=2), model)


@pytest.mark.parametrize("name", MAMBAS)
def test_a_long_prompt_gives_the_logits_of_transformers(name: str, tmp_path: Path) -> None:
    model = mamba_model(name)
    backend = load_native(folder_of(tmp_path, model), None, kv="f32", threads=2)
    text = [int(t) for t in torch.randint(0, 96, (700,))]
    (logits,) = backend.extend([Nodes(backend.open(), text)])
    with torch.inference_mode():
        want = model(input_ids=torch.tensor([text]), use_cache=False).logits[0]
    torch.testing.assert_close(logits, want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", MAMBAS)
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_node_has_the_same_bits_in_any_company(name: str, threads: int, tmp_path: Path) -> None:
    model = mamba_model(name)
    weights = "int4" if "moe" in name or name in ("granite-hybrid", "nemotron-h") else "int8"
    backend = load_native(folder_of(tmp_path, model), None, weights=weights, threads=threads)
    check_bitwise(backend, seed=threads)


@pytest.mark.parametrize("name", GGUF)
def test_a_gguf_file_gives_the_logits_of_transformers(name: str, tmp_path: Path) -> None:
    # Converters write no biases of Granite's that llama.cpp reads.
    model = mamba_model(name, **({"mlp_bias": False} if name == "granite" else {}))
    path = save_mamba(tmp_path / "m.gguf", name, model)
    check_logits(load_native(folder_of(tmp_path, model), path, kv="f32", threads=2), model)
