"""Models with recurrent layers: Transformers' logits, and the same bits in any company."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_families import check_logits
from test_native import check_bitwise, folder_of

from hybrids_kit import HYBRIDS, hybrid_model
from redwood.backends.base import Nodes
from redwood.backends.native.load import load_native

pytest.importorskip("redwood._native", reason="installed without a compiler")


@pytest.mark.parametrize("name", HYBRIDS)
def test_a_folder_gives_the_logits_of_transformers(name: str, tmp_path: Path) -> None:
    model = hybrid_model(name)
    check_logits(load_native(folder_of(tmp_path, model), None, kv="f32", threads=2), model)


@pytest.mark.parametrize("name", HYBRIDS)
def test_a_long_prompt_gives_the_logits_of_transformers(name: str, tmp_path: Path) -> None:
    model = hybrid_model(name)
    backend = load_native(folder_of(tmp_path, model), None, kv="f32", threads=2)
    text = [int(t) for t in torch.randint(0, 96, (700,))]
    (logits,) = backend.extend([Nodes(backend.open(), text)])
    with torch.inference_mode():
        want = model(input_ids=torch.tensor([text]), use_cache=False).logits[0]
    torch.testing.assert_close(logits, want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", HYBRIDS)
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_node_has_the_same_bits_in_any_company(name: str, threads: int, tmp_path: Path) -> None:
    model = hybrid_model(name)
    backend = load_native(folder_of(tmp_path, model), None, weights="int8", threads=threads)
    check_bitwise(backend, seed=threads)
