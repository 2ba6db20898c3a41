"""Mixtures whose files do not say what their tensors hold: refused at load, by name."""

from __future__ import annotations

import contextlib
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from decoder_kit import write_gguf
from families_kit import GGUF, MIXTURES, family_model, family_settings, family_tensors, save_family
from redwood.backends.native.spec_gguf import spec_from_gguf
from redwood.backends.native.weights import open_gguf
from redwood.errors import ModelError, RedwoodError, UnsupportedError
from redwood.models._gguf import GGUFFile

EARLIER = ("qwen2moe", "qwen3moe", "mixtral", "olmoe", "gptoss")
LATER = ("glm4moe", "deepseek2", "deepseek2q", "deepseek3", "glm4moelite")


def saved(path: Path, family: str, changes: dict[str, Any], **settings: Any) -> Path:
    """A GGUF file of a family with tensors in the place of its own; None takes one out."""
    model = family_model(family)
    stated = {**family_settings(family, model), **settings}
    tensors = {**family_tensors(family, model), **changes}
    return write_gguf(
        path,
        GGUF[family],
        {key: value for key, value in stated.items() if value is not None},
        {name: value for name, value in tensors.items() if value is not None},
    )


@pytest.mark.parametrize("family", [*EARLIER, *LATER])
@pytest.mark.parametrize("part", ["gate", "up", "down"])
def test_one_tensor_of_experts_of_another_shape(family: str, part: str, tmp_path: Path) -> None:
    name = f"blk.1.ffn_{part}_exps.weight"
    count, rows, cols = family_tensors(family, family_model(family))[name].shape
    for shape in ((count - 1, rows, cols), (count, cols + 1, rows), (count, rows), (1, rows, cols)):
        path = saved(tmp_path / "m.gguf", family, {name: np.ones(shape, np.float32)})
        with pytest.raises(ModelError) as caught:
            open_gguf(path)
        assert f"{name!r} has shape {shape} instead of" in str(caught.value)
    with pytest.raises(ModelError) as caught:
        open_gguf(saved(tmp_path / "m.gguf", family, {name: None}))
    assert f"lacks the tensor {name!r}" in str(caught.value)


@pytest.mark.parametrize("family", [*EARLIER, *LATER])
@pytest.mark.parametrize(
    "settings, message",
    [
        ({"expert_used_count": 99}, "cannot have 99 experts of"),
        ({"expert_used_count": 0}, "expert_used_count 0 must be"),
        ({"expert_used_count": None}, "expert_used_count is missing"),
        ({"expert_count": 1 << 20}, "at most 1024"),
        ({"expert_gating_func": 4}, "expert_gating_func 4 is a router"),
        ({"expert_gating_func": "softmax"}, "expert_gating_func softmax is a router"),
        ({"expert_group_count": 5, "expert_group_used_count": 2}, "group"),
        ({"expert_groups": 2}, "expert_groups is not supported"),
    ],
)
def test_counts_and_routers_that_make_no_sense(
    family: str, settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = save_family(tmp_path / "m.gguf", family, family_model(family), **settings)
    with pytest.raises((ModelError, UnsupportedError)) as caught:
        open_gguf(path)
    said = str(caught.value)
    assert message in said and str(path) in said and "\n" not in said


@pytest.mark.parametrize("family", MIXTURES)
def test_any_value_of_any_setting_of_a_file_is_read_or_refused(family: str, tmp_path: Path) -> None:
    model = GGUFFile(save_family(tmp_path / "m.gguf", family, family_model(family)))
    stated = dict(model.metadata)
    for key in stated:
        for value in (None, 0, -1, 7, 10**40, 0.5, math.nan, math.inf, "x", [], [1], True):
            model.metadata = {**stated, key: value}
            with contextlib.suppress(RedwoodError):
                assert spec_from_gguf(model).layers <= 7
    model.close()
