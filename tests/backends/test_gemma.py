"""Gemma 3n and Gemma 4: per-layer embeddings, heads of two sizes, shared keys and values, AltUp."""

from __future__ import annotations

import contextlib
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from test_families import check_logits, rewritten
from test_native import check_bitwise, filled, folder_of

import redwood
from gemma_kit import MODELS, gemma_model, save_gemma, with_images
from redwood.backends.base import Nodes
from redwood.backends.eager.load import wrap_model
from redwood.backends.native.load import load_native
from redwood.backends.native.weights import open_folder, open_gguf
from redwood.errors import ModelError, RedwoodError, UnsupportedError

pytest.importorskip("redwood._native", reason="installed without a compiler")


@pytest.mark.parametrize("name", MODELS)
def test_a_folder_gives_the_logits_of_transformers(name: str, tmp_path: Path) -> None:
    model = gemma_model(name)
    check_logits(load_native(folder_of(tmp_path, model), None, kv="f32", threads=2), model)


@pytest.mark.parametrize("name", MODELS)
def test_a_gguf_file_gives_the_logits_of_transformers(name: str, tmp_path: Path) -> None:
    model = gemma_model(name)
    path = save_gemma(tmp_path / "m.gguf", model)
    check_logits(load_native(folder_of(tmp_path, model), path, kv="f32", threads=3), model)


@pytest.mark.parametrize("weights", ["auto", "int8", "int4"])
@pytest.mark.parametrize("name", MODELS)
def test_a_node_has_the_same_bits_in_any_company(name: str, weights: str, tmp_path: Path) -> None:
    model = gemma_model(name, max_position_embeddings=2048)
    backend = load_native(folder_of(tmp_path, model), None, weights=weights, threads=2)
    check_bitwise(backend, seed=6)
