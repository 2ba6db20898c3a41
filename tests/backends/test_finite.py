"""No weight that is NaN or infinite is loaded, wherever it stands: one token may hide it."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf.quants import dequantize
from numpy.typing import NDArray

from conftest import tiny_tokenizer
from decoder_kit import gguf_settings, gguf_tensors, stored, tiny_model, write_gguf
from redwood.backends.native.finite import check_weights
from redwood.backends.native.load import load_native
from redwood.errors import NumericalError
from redwood.models._gguf import BLOCKS

# Kinds whose scale has no NaN are left out, and those that no matrix of a model has.
KINDS = [
    *("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K"),
    "Q5_K",
    *("Q6_K", "IQ4_NL", "IQ4_XS", "IQ3_S", "IQ3_XXS", "IQ2_S", "IQ2_XS", "IQ2_XXS"),
    *("IQ1_S", "IQ1_M", "TQ1_0", "TQ2_0"),
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_block_is_refused_where_its_numbers_are_no_numbers(kind: str) -> None:
    """Every single bit of a block is turned; what `gguf` then makes of it decides."""
    rng = np.random.default_rng(0)
    good, _ = stored(rng.normal(0.0, 0.02, (1, 256)).astype(np.float32), kind)
    good = np.ascontiguousarray(good).view(np.uint8).reshape(-1)
    check_weights("w", kind, good)
    size = BLOCKS[kind][1]
    changes = [rng.integers(0, 256, len(good), dtype=np.uint8) for _ in range(60)]
    for bit in range(8 * size):
        changes.append(good.copy())
        changes[-1][bit // 8] ^= 1 << bit % 8
    for changed in changes:
        with np.errstate(all="ignore"):
            fine = np.isfinite(_numbers(changed, kind)).all()
        if fine:
            check_weights("w", kind, changed)
        else:
            with pytest.raises(NumericalError, match=rf"w \({kind}\) hold NaN"):
                check_weights("w", kind, changed)


def _numbers(raw: NDArray[np.uint8], kind: str) -> NDArray[np.float32]:
    made = dequantize(raw, gguf.GGMLQuantizationType[kind])
    return np.asarray(made, np.float32)


@pytest.mark.parametrize(
    "part", ["attn_q", "attn_v", "ffn_gate", "ffn_down", "attn_norm", "token_embd"]
)
def test_a_file_is_refused_by_the_name_of_its_tensor(part: str, tmp_path: Path) -> None:
    model = tiny_model("llama", hidden_size=64, num_hidden_layers=2)
    tensors = gguf_tensors(model)
    name = next(name for name in tensors if part in name)
    bad = tensors[name].copy()
    bad.reshape(-1)[-1] = np.inf
    tensors[name] = bad
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    path = write_gguf(tmp_path / "m.gguf", "llama", gguf_settings(model), tensors)
    with pytest.raises(NumericalError, match="NaN or infinite"):
        load_native(tmp_path, path, threads=1)
