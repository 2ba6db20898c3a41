"""TreeBuilder a model changes what it costs, not what it says."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from conftest import tiny_llama
from redwood.models import resolve

_FILE = Path(__file__).parents[2] / "benchmarks" / "gpu" / "grow.py"
_SPEC = importlib.util.spec_from_file_location("grow", _FILE)
assert _SPEC is not None and _SPEC.loader is not None
growing: Any = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(growing)

IDS = torch.arange(3, 90)[None]
LARGER = growing.Size(hidden=80, ffn=144, layers=5, heads=12, kv_heads=3)


def _logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    return logits


def _uneven(model: Any) -> Any:
    """Norms and biases that are not all ones and zeros; eps large enough to matter."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.3 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_a_wider_and_deeper_model_has_the_same_logits(tied: bool, bias: bool) -> None:
    changes = {"attention_bias": bias, "mlp_bias": bias, "rms_norm_eps": 0.05}
    model = _uneven(tiny_llama(tie_word_embeddings=tied, **changes))
    made = growing.grow(model, LARGER)
    assert growing.size_of(made) == LARGER
    assert sum(p.numel() for p in made.parameters()) > 5 * sum(
        p.numel() for p in model.parameters()
    )
    torch.testing.assert_close(_logits(made), _logits(model), atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize(
    "size",
    [
        LARGER._replace(hidden=32, ffn=64, layers=2),
        LARGER._replace(hidden=32, heads=4, kv_heads=2, layers=2),
        LARGER._replace(ffn=64, heads=4, kv_heads=2, layers=2),
        growing.Size(32, 64, 4, 4, 2),
        growing.Size(32, 64, 2, 4, 2),
    ],
)
def test_every_way_to_grow_keeps_the_logits_alone(size: Any) -> None:
    model = _uneven(tiny_llama())
    torch.testing.assert_close(
        _logits(growing.grow(model, size)), _logits(model), atol=2e-4, rtol=2e-4
    )


def test_other_families_with_biases_grow_as_well() -> None:
    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
    )
    model = _uneven(transformers.Qwen2ForCausalLM(config).eval())
    torch.testing.assert_close(
        _logits(growing.grow(model, LARGER)), _logits(model), atol=2e-4, rtol=2e-4
    )


def test_half_precision_is_made_directly_and_stays_near() -> None:
    model = tiny_llama().to(torch.bfloat16)
    made = growing.grow(model, LARGER._replace(hidden=128))
    assert made.dtype == torch.bfloat16
    want, got = _logits(model).float(), _logits(made).float()
    assert float((got - want).abs().max()) < 0.2 * float(want.std())


def test_the_work_is_not_on_zeros() -> None:
    made = growing.grow(tiny_llama(), LARGER)
    zeros = sum(int((p == 0).sum()) for p in made.model.layers[0].parameters())
    assert zeros < 0.55 * sum(p.numel() for p in made.model.layers[0].parameters())


def test_sizes_that_do_not_hold_the_model_are_refused() -> None:
    for size in (
        LARGER._replace(hidden=16),
        LARGER._replace(layers=1),
        LARGER._replace(heads=4, kv_heads=4),
        LARGER._replace(heads=13, kv_heads=3),
    ):
        with pytest.raises(ValueError, match="hold|divide"):
            growing.grow(tiny_llama(), size)
    with pytest.raises(ValueError, match="gpt2"):
        config = transformers.GPT2Config(n_embd=32, n_head=4, n_layer=1, vocab_size=50)
        growing.grow(transformers.GPT2LMHeadModel(config), LARGER)


def test_all_of_it_is_made_on_the_device_and_seven_b_is_seven_billion() -> None:
    config = transformers.LlamaConfig(  # SmolLM2-135M's
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    made = growing.grow(model, growing.SEVEN_B, dtype=torch.bfloat16)
    parts = [*made.parameters(), *made.buffers()]
    assert {part.device.type for part in parts} == {"meta"}
    assert 7.0e9 < sum(p.numel() for p in made.parameters()) < 7.5e9
    assert made.dtype == torch.bfloat16


@pytest.mark.slow
def test_smollm2_grows() -> None:
    folder = resolve("smollm2-135m-instruct")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    made = growing.grow(model, growing.Size(1152, 3072, 36, 24, 6))
    want, got = _logits(model), _logits(made)
    assert float((got - want).abs().max()) < 1e-4 * float(want.std())
    assert torch.equal(got.argmax(-1), want.argmax(-1))
