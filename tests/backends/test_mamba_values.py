"""Settings of models with Mamba-2 layers with any values: read, or refused in one line."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from test_native import folder_of

from mambas_gguf import mamba_settings, save_mamba
from mambas_kit import mamba_model
from redwood.backends.native.weights import open_folder, open_gguf
from redwood.errors import RedwoodError

pytest.importorskip("redwood._native", reason="installed without a compiler")

STATED: list[Any] = [0, 1, 3, 2**31, True, "x", [0], [1] * 4, [0] * 4, math.nan, math.inf, -1.0]
KEYS = ("ssm.", "_scale", "head_count_kv", "feed_forward_length", "expert_", "finetuned")
FIELDS: list[Any] = [None, 0, 3, -1, "x", [], [1, 1], [0.1] * 5, -1.0, math.inf, {"a": 1}]
SETTINGS = ("mamba", "time_step", "multiplier", "n_group", "state_size", "conv", "layer", "head")


def check(path: Path, opens: Any) -> None:
    try:
        opens(path).close()
    except RedwoodError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize("name", ["mamba2", "granite-hybrid", "nemotron-h-moe"])
def test_keys_with_any_values(name: str, tmp_path: Path) -> None:
    model = mamba_model(name)
    keys = {*mamba_settings(model), "residual_scale", "ssm.group_count", "expert_weights_norm"}
    for key in sorted(key for key in keys if any(part in key for part in KEYS)):
        for value in STATED:
            check(save_mamba(tmp_path / "m.gguf", name, model, **{key: value}), open_gguf)


@pytest.mark.parametrize("name", ["mamba2", "falcon-h1", "nemotron-h"])
def test_settings_with_any_values(name: str, tmp_path: Path) -> None:
    folder = folder_of(tmp_path, mamba_model(name))
    file = folder / "config.json"
    config = json.loads(file.read_text())
    for setting in sorted(part for part in config if any(each in part for each in SETTINGS)):
        for value in FIELDS:
            file.write_text(json.dumps({**config, setting: value}))
            check(folder, open_folder)
