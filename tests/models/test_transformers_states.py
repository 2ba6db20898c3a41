"""States of recurrent layers: which modules have them, and how they are copied, joined and cut."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from conftest import tiny_llama
from eager_hybrids_kit import tiny_hybrid
from redwood.errors import UnsupportedError
from redwood.models import _transformers_states as states


def test_modules_that_keep_a_state_are_found_by_their_code() -> None:
    assert states.recurrent_modules(tiny_llama()) == {}
    found = states.recurrent_modules(tiny_hybrid("qwen3_next"))
    assert list(found) == [f"model.layers.{i}.linear_attn" for i in range(3)]
    found = states.recurrent_modules(tiny_hybrid("lfm2"))
    assert list(found) == [f"model.layers.{i}.conv" for i in (0, 1, 3)]


def _read(places: states.States, module: Any, state: Any, hidden: torch.Tensor) -> Any:
    with torch.inference_mode():
        return module(hidden, cache=places.cache_with(state))


def test_a_state_is_copied_joined_and_cut_by_batch() -> None:
    model = tiny_hybrid("qwen3_next")
    module: Any = next(iter(states.recurrent_modules(model).values()))
    places = states.States(model.config, module)
    assert states.state_tensors(places.empty) == []
    assert states.state_bytes(places.empty) == 0
    hidden = torch.randn(2, 6, 32)
    made = [states.mapped_state([places.empty], lambda parts: parts[0].clone()) for _ in range(2)]
    for state, each in zip(made, hidden, strict=True):
        _read(places, module, state, each[None, :5])
    assert states.state_tensors(places.empty) == []  # the empty one stays empty
    before = [tensor.clone() for tensor in states.state_tensors(made[0])]
    both = states.mapped_state(made, torch.cat)
    assert states.state_bytes(both) == 2 * states.state_bytes(made[0]) > 0
    together = _read(places, module, both, hidden[:, 5:])
    for old, tensor in zip(before, states.state_tensors(made[0]), strict=True):
        assert torch.equal(old, tensor)
    for i in range(2):
        alone = _read(places, module, made[i], hidden[i : i + 1, 5:])
        torch.testing.assert_close(alone, together[i : i + 1])
        cut = states.mapped_state([both], lambda parts, i=i: parts[0][i : i + 1])
        for one, other in zip(
            states.state_tensors(cut), states.state_tensors(made[i]), strict=True
        ):
            torch.testing.assert_close(one, other)


def test_a_module_without_a_place_in_the_cache_is_refused() -> None:
    model = tiny_hybrid("lfm2")
    for layer in (None, 2, 99):  # none, one of attention, one beyond the last
        with pytest.raises(UnsupportedError, match="keeps a state, but .* no place for it"):
            states.States(model.config, SimpleNamespace(layer_idx=layer))


def test_blocks_are_no_larger_than_the_text_and_come_back() -> None:
    module = SimpleNamespace(chunk_size=256)
    for length, size in ((1, 2), (2, 2), (3, 4), (9, 16), (256, 256), (1000, 256)):
        with states.small_blocks(module, length):
            assert module.chunk_size == size
    with pytest.raises(ValueError), states.small_blocks(module, 3):
        raise ValueError
    assert module.chunk_size == 256
    with states.small_blocks(SimpleNamespace(), 3):
        pass


def test_limits_of_time_steps_that_are_there_are_made_to_bite() -> None:
    for family, limit in (("nemotron_h", (0.5, 1.0)), ("mamba2", (0.0, float("inf")))):
        model = tiny_hybrid(family)
        states.tighten_limits(model)
        for module in states.recurrent_modules(model).values():
            assert tuple(module.time_step_limit) == limit
