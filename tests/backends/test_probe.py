"""The check at load: rounding passes, whatever the processor; what is wrong is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from test_backends import ARCHITECTURES, EXPERTS, _random_model
from torch import Tensor, nn
from transformers.models.llama import modeling_llama

from conftest import save_model, tiny_llama, tiny_tokenizer
from offload_kit import opened
from redwood.backends.eager import probe
from redwood.backends.eager.backend import ATTENTION, EagerBackend
from redwood.backends.eager.probe import check_structure, natural_tokens, stock_logits
from redwood.backends.eager.small import small_models
from redwood.backends.load import wrap_model
from redwood.errors import NumericalError, UnsupportedError

Break = Callable[[Any], None]


def _outliers(model: Any, by: float = 60.0) -> Any:
    """Some features of the stream grow, as in trained models: they drown the others in rounding."""
    with torch.no_grad():
        model.model.embed_tokens.weight[:, [3, 17]] *= by
        for layer in model.model.layers:
            layer.mlp.down_proj.weight[[3, 17]] *= by
    return model


def _rounded(linear: nn.Linear, noise: float, seed: int) -> None:
    """Another summation, of another processor: its result depends on how many rows come along."""
    plain = linear.forward

    def forward(x: Tensor) -> Tensor:
        made = plain(x)
        generator = torch.Generator().manual_seed(seed + x.numel())
        by = 1 + noise * torch.randn(made.shape, generator=generator)
        return (made.float() * by).to(made.dtype)

    linear.forward = forward  # type: ignore[method-assign]


def _elsewhere(model: Any, noise: float) -> Any:
    for seed, linear in enumerate(m for m in model.modules() if isinstance(m, nn.Linear)):
        _rounded(linear, noise, 1000 * seed)
    return model


# --- rounding passes -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("seed", range(3))
def test_outliers_and_another_summation_are_no_reason_to_refuse(
    dtype: torch.dtype, seed: int
) -> None:
    model = _outliers(tiny_llama(seed, layers=4)).to(dtype)
    noise = torch.finfo(dtype).eps / 2
    assert wrap_model(_elsewhere(model, noise)).vocab_size == 300


def test_the_old_limit_refused_a_right_model_for_its_rounding() -> None:
    model = _elsewhere(_outliers(tiny_llama(1, layers=6)).to(torch.bfloat16), 2.0**-8)
    model.set_attn_implementation("eager")
    stock = stock_logits(model, natural_tokens(model))
    model.set_attn_implementation(ATTENTION)
    got = probe.tree_logits(EagerBackend(model, 64), stock.tokens)
    assert float((got - stock.logits).abs().max() / stock.logits.std()) > 0.3
    assert wrap_model(model)


@pytest.mark.parametrize("weights", ["bf16", "int8", "int4"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("seed", range(2))
def test_activations_of_8_bits_that_stream_are_no_reason_to_refuse(
    weights: str, dtype: str, seed: int, tmp_path: Path
) -> None:
    folder = save_model(tmp_path / "m", _outliers(tiny_llama(seed, layers=4)), tiny_tokenizer())
    assert opened(folder, weights, dtype=dtype).name == "offload"


class _EightBits(nn.Module):
    """A linear layer that rounds its inputs to 8 bits, a scale for each row."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = linear.weight

    def forward(self, x: Tensor) -> Tensor:
        scale = x.abs().amax(-1, keepdim=True).clamp_min(1e-9) / 127
        return torch.nn.functional.linear((x / scale).round() * scale, self.weight)


def _eight_bits(model: Any) -> Any:
    for layer in model.model.layers:
        for part in (layer.self_attn, layer.mlp):
            for name, child in list(part.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(part, name, _elsewhere(_EightBits(child), 0))
    return model


@pytest.mark.parametrize("seed", range(4))
def test_a_models_own_8_bit_layers_are_no_reason_to_refuse(seed: int) -> None:
    model = _eight_bits(_outliers(tiny_llama(seed, layers=6)))
    assert wrap_model(_elsewhere(model, 1e-7))


@pytest.mark.parametrize("kind", sorted({**ARCHITECTURES, **EXPERTS}))
def test_every_architecture_passes_in_bf16(kind: str) -> None:
    model = _random_model(kind).to(torch.bfloat16)
    assert wrap_model(model).model is model


# --- what is wrong is refused --------------------------------------------------------------------


def _patched(model: Any, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    original = model.forward
    model.forward = lambda **given: original(**change(given))


def _no_positions(model: Any) -> None:
    _patched(model, lambda given: {**given, "position_ids": None})


def _late_positions(model: Any) -> None:
    """Positions by order, not by depth: wrong for siblings alone."""

    def change(given: dict[str, Any]) -> dict[str, Any]:
        at = given.get("position_ids")
        if at is not None:
            at = at.min() + torch.arange(at.shape[-1]).expand_as(at)
        return {**given, "position_ids": at}

    _patched(model, change)


def _looks_back(model: Any) -> None:
    """A convolution over the text: a node's neighbour in the tree is not the token before it."""
    layer = model.model.layers[0].mlp

    def mix(_: Any, given: Any, made: Tensor) -> Tensor:
        return made + 0.5 * torch.cat([made[:, :1], made[:, :-1]], 1)

    layer.register_forward_hook(mix)


def _over_the_text(model: Any) -> None:
    """Something that is normed over all tokens of a forward."""
    model.model.norm.register_forward_hook(lambda _, given, made: made - made.mean(1, keepdim=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wrong", [_no_positions, _late_positions, _looks_back, _over_the_text])
def test_a_module_that_was_changed_after_it_was_made_is_refused(
    wrong: Break, dtype: torch.dtype
) -> None:
    model = tiny_llama().to(dtype)
    assert wrap_model(model)
    wrong(model)
    with pytest.raises(UnsupportedError, match="in a tree than on its paths"):
        wrap_model(model)


class _OwnAttention(modeling_llama.LlamaAttention):
    """Attention of a user's own, which never calls Transformers' interface."""

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        q, k, v = (
            part(hidden_states).view(shape).transpose(1, 2)
            for part in (self.q_proj, self.k_proj, self.v_proj)
        )
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=True
        )
        return self.o_proj(out.transpose(1, 2).flatten(2)), None


class _NeverOurs(transformers.LlamaForCausalLM):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        for number, layer in enumerate(self.model.layers):
            layer.self_attn = _OwnAttention(config, number)


class _HalfOurs(transformers.LlamaForCausalLM):
    """Every second layer has attention of its own, which sees nothing of what is in the slots."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        for number, layer in list(enumerate(self.model.layers))[1::2]:
            layer.self_attn = _OwnAttention(config, number)


class _Summed(transformers.LlamaForCausalLM):
    """Every token sees the mean of those before it, beside attention."""

    def forward(self, *args: Any, **given: Any) -> Any:
        made = super().forward(*args, **given)
        count = torch.arange(1, made.logits.shape[1] + 1)[:, None]
        made.logits = made.logits + 0.02 * made.logits.cumsum(1) / count
        return made


class _OtherScale(modeling_llama.LlamaAttention):
    """A factor that its own attention knows of, and ours is not told."""

    def forward(self, hidden_states: Tensor, *args: Any, **given: Any) -> Any:
        out, weights = super().forward(hidden_states, *args, **given)
        return out * (1.05 if self.config._attn_implementation == "eager" else 1.0), weights


class _Scaled(transformers.LlamaForCausalLM):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        for number, layer in enumerate(self.model.layers):
            layer.self_attn = _OtherScale(config, number)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [_NeverOurs, _HalfOurs, _Summed, _Scaled])
def test_a_class_that_is_wrong_by_little_is_refused_in_every_dtype(
    kind: Any, dtype: torch.dtype
) -> None:
    model = kind(tiny_llama(layers=4, initializer_range=0.1).config).eval().to(dtype)
    with pytest.raises(UnsupportedError, match="gives other logits|attention"):
        wrap_model(model)


@pytest.mark.parametrize("kind", ["mistral", "gemma2", "gemma3_text"])
@pytest.mark.parametrize("wrong", ["window", "softcap", "mask", "positions"])
def test_wrong_masks_windows_and_caps_of_ours_are_seen_in_bf16(
    kind: str, wrong: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from redwood.backends.eager import backend as eager

    ours = eager._attention

    def other(module: Any, query: Any, key: Any, value: Any, mask: Any = None, **given: Any) -> Any:
        if wrong == "window" and given.get("sliding_window"):
            given["sliding_window"] += 1
        if wrong == "softcap":
            given.pop("softcap", None)
        return ours(module, query, key, value, mask, **given)

    monkeypatch.setitem(transformers.AttentionInterface._global_mapping, ATTENTION, other)
    if wrong == "mask":
        monkeypatch.setattr(eager, "ancestor_mask", lambda parents, n: _all_before(parents, n))
    if wrong == "positions":
        cached = eager.cached_logits
        monkeypatch.setattr(
            eager, "cached_logits", lambda m, ids, at, *more: cached(m, ids, at + at % 2, *more)
        )
    model = _random_model(kind).to(torch.bfloat16)
    if wrong == "softcap" and kind != "gemma2":
        assert wrap_model(model)
        return
    with pytest.raises(UnsupportedError, match="in a tree than on its paths"):
        wrap_model(model)


def _all_before(parents: Any, n: int) -> Any:
    import numpy as np

    return np.tril(np.ones((len(parents), len(parents)), dtype=np.bool_))[-n:]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("place", ["model.layers.1.mlp.up_proj", "model.norm", "lm_head"])
def test_nan_anywhere_in_the_weights_is_refused(place: str, dtype: torch.dtype) -> None:
    model = tiny_llama().to(dtype)
    with torch.no_grad():
        model.get_submodule(place).weight.view(-1)[5] = float("nan")
    with pytest.raises(NumericalError, match="NaN"):
        wrap_model(model)


# --- the small model, and the tokens -------------------------------------------------------------


@pytest.mark.parametrize("kind", sorted({**ARCHITECTURES, **EXPERTS}))
def test_a_small_model_has_every_layer_of_a_large_one(kind: str) -> None:
    config = transformers.AutoConfig.for_model(kind)  # as large as the class makes it by itself
    with torch.device("meta"):
        large = transformers.AutoModelForCausalLM.from_config(config)
    before = torch.get_rng_state()
    small = next(small_models(large, 0, torch.float32, 1.0))
    assert torch.equal(torch.get_rng_state(), before)
    assert sum(weight.numel() for weight in small.parameters()) < 1e8
    names = {name for name, _ in large.named_parameters()}
    assert type(small) is type(large)
    expert = ".experts."
    assert {name for name, _ in small.named_parameters() if expert not in name} == {
        name for name in names if expert not in name
    }
    text = small.config.get_text_config()
    assert getattr(text, "layer_types", None) == getattr(config, "layer_types", None)
    if getattr(config, "sliding_window", None):
        assert text.sliding_window < probe._PROMPT


def test_gemma_2_is_compared_with_the_attention_that_knows_its_soft_cap() -> None:
    assert check_structure(_random_model("gemma2")).attention == "eager"
    assert check_structure(_random_model("llama")).attention == "sdpa"


def test_a_make_that_cannot_be_small_is_checked_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "small_models", lambda *given: iter(()))
    assert wrap_model(tiny_llama())
    model = _Summed(tiny_llama().config).eval()
    with pytest.raises(UnsupportedError, match="where rounding explains"):
        wrap_model(model)


def test_tokens_are_spelled_by_the_models_own_tokenizer(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "m", tiny_llama(), tiny_tokenizer())
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokens = natural_tokens(loaded)
    assert probe._TEXT.startswith(tiny_tokenizer().decode(tokens))
    assert len(tokens) == probe.PROBE_SLOTS
    assert natural_tokens(tiny_llama()) == list(range(1, probe.PROBE_SLOTS + 1))
    (folder / "tokenizer.json").write_text("no tokenizer")
    assert natural_tokens(loaded) == list(range(1, probe.PROBE_SLOTS + 1))


def test_a_context_of_few_tokens_is_enough() -> None:
    config = transformers.GPT2Config(
        vocab_size=300, n_embd=32, n_head=4, n_layer=2, n_positions=12, eos_token_id=1
    )
    assert wrap_model(transformers.GPT2LMHeadModel(config).eval()).capacity == 12


def test_a_user_that_wants_fewer_bits_of_float32_is_not_refused() -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        assert wrap_model(tiny_llama())
    finally:
        torch.set_float32_matmul_precision(before)
