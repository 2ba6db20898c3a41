"""Every family beside those of `test_native`, against Transformers' own logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_native import PARENTS, PROMPT, TOKENS, check_bitwise, filled, folder_of, path_of

from families_kit import FAMILIES, GGUF, MIXTURES, family_model, save_family
from redwood.backends.base import Nodes
from redwood.backends.native.backend import NativeBackend
from redwood.backends.native.load import load_native

pytest.importorskip("redwood._native", reason="installed without a compiler")


def check_logits(backend: NativeBackend, model: Any, limit: float = 1e-4) -> None:
    """A tree behind a prompt in chunks says what Transformers says of each path."""
    row = filled(backend, PROMPT, chunk=4)
    (logits,) = backend.extend([Nodes(row, TOKENS, PARENTS)])
    for node in range(len(TOKENS)):
        text = PROMPT + [TOKENS[n] for n in path_of(PARENTS, node)]
        with torch.inference_mode():
            want = model(input_ids=torch.tensor([text]), use_cache=False).logits[0, -1]
        torch.testing.assert_close(logits[node], want, atol=limit, rtol=limit)
    backend.release(row)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_gives_the_logits_of_transformers(family: str, tmp_path: Path) -> None:
    model = family_model(family)
    check_logits(load_native(folder_of(tmp_path, model), None, kv="f32", threads=2), model)


@pytest.mark.parametrize("family", GGUF)
def test_a_gguf_file_gives_the_logits_of_transformers(family: str, tmp_path: Path) -> None:
    # Converters write no window for StarCoder 2.
    model = family_model(family, **({"sliding_window": None} if family == "starcoder2" else {}))
    path = save_family(tmp_path / "m.gguf", family, model)
    check_logits(load_native(folder_of(tmp_path, model), path, kv="f32", threads=2), model)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_node_has_the_same_bits_in_any_company(family: str, tmp_path: Path) -> None:
    model = family_model(family, max_position_embeddings=2048)
    weights = "int4" if family in MIXTURES else "int8"
    check_bitwise(load_native(folder_of(tmp_path, model), None, weights=weights, threads=2), seed=5)
