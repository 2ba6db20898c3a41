"""What a token takes, as Python counts it, is what a page of the decoder takes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_native import folder_of

from decoder_kit import tiny_model
from families_kit import family_model
from gemma_kit import gemma_model
from hybrids_kit import hybrid_model
from mambas_kit import mamba_model
from redwood.backends.native.load import load_native

pytest.importorskip("redwood._native", reason="installed without a compiler")

# How many layers of the model hold keys and values.
MADE: list[tuple[Callable[[str], Any], str, Callable[[Any], int]]] = [
    (tiny_model, "qwen3", lambda config: config.num_hidden_layers),
    (family_model, "deepseek3", lambda config: config.num_hidden_layers),
    (
        gemma_model,
        "gemma3n",
        lambda config: config.num_hidden_layers - config.num_kv_shared_layers,
    ),
    (hybrid_model, "lfm2", lambda config: config.layer_types.count("full_attention")),
    (hybrid_model, "qwen35", lambda config: config.layer_types.count("full_attention")),
    (mamba_model, "granite-hybrid", lambda config: config.layer_types.count("full_attention")),
    (mamba_model, "falcon-h1", lambda config: config.num_hidden_layers),
    (mamba_model, "mamba2", lambda config: 1),  # of none: rows are counted by it
]


@pytest.mark.parametrize("kv", ["f16", "f32"])
@pytest.mark.parametrize("make, name, holding", MADE, ids=[name for _, name, _ in MADE])
def test_a_token_takes_its_share_of_a_page(
    make: Callable[[str], Any],
    name: str,
    holding: Callable[[Any], int],
    kv: str,
    tmp_path: Path,
) -> None:
    model = make(name)
    backend = load_native(folder_of(tmp_path, model), None, kv=kv, threads=1)
    assert backend.page_bytes == backend.page_slots * backend.token_bytes > 0
    spec = backend.spec
    holders = [layer for layer in range(spec.layers) if spec.holds_keys(layer)]
    assert len(holders) == holding(model.config)
