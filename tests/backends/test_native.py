"""The native backend: right against Transformers, and bit for bit the same in any company."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conftest import tiny_tokenizer
from decoder_kit import CLASSES, PlainDecoder, save_gguf, tiny_model
from redwood.backends.base import AcceptedPath, Nodes
from redwood.backends.native import load as native_load
from redwood.backends.native.backend import NativeBackend, extension
from redwood.backends.native.load import load_native
from redwood.backends.native.weights import open_gguf
from redwood.errors import ArgumentError, NumericalError

pytest.importorskip("redwood._native", reason="installed without a compiler")

PROMPT = [5, 9, 17, 33, 65, 12, 2, 77, 54, 20, 61]
TOKENS = [3, 14, 15, 92, 65, 35, 89, 79]
PARENTS = [-1, 0, 0, 1, 2, 2, 3, 6]
WIDE = {"hidden_size": 256, "intermediate_size": 512}  # super-blocks need 256 columns


def folder_of(path: Path, model: Any) -> Path:
    model.save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


def filled(backend: NativeBackend, tokens: list[int], chunk: int = 1000) -> int:
    row = backend.open()
    for start in range(0, len(tokens), chunk):
        part = tokens[start : start + chunk]
        backend.extend([Nodes(row, part, num_logits=0)])
        backend.commit([AcceptedPath(row, range(len(part)))])
    return row


def plain(backend: NativeBackend, tokens: list[int]) -> torch.Tensor:
    """Logits after each token, decoded one at a time in a row of its own."""
    row, out = backend.open(), []
    for token in tokens:
        (logits,) = backend.extend([Nodes(row, [token])])
        backend.commit([AcceptedPath(row, [0])])
        out.append(logits[0])
    backend.release(row)
    return torch.stack(out)


def path_of(parents: list[int], node: int) -> list[int]:
    path = [node]
    while parents[path[0]] >= 0:
        path.insert(0, parents[path[0]])
    return path


@pytest.mark.parametrize("architecture", sorted(CLASSES))
def test_logits_equal_those_of_transformers(architecture: str, tmp_path: Path) -> None:
    model = tiny_model(architecture)
    backend = load_native(folder_of(tmp_path, model), None, kv="f32", threads=2)
    row = filled(backend, PROMPT, chunk=4)
    (logits,) = backend.extend([Nodes(row, TOKENS, PARENTS)])
    for node in range(len(TOKENS)):
        text = PROMPT + [TOKENS[n] for n in path_of(PARENTS, node)]
        with torch.inference_mode():
            want = model(input_ids=torch.tensor([text]), use_cache=False).logits[0, -1]
        torch.testing.assert_close(logits[node], want, atol=3e-4, rtol=3e-4)


FLOATS = ["F32", "F16", "BF16"]
CODES = ["IQ4_NL", "MXFP4", "IQ4_XS", "IQ3_S", "IQ3_XXS", "IQ2_S", "IQ2_XS", "IQ2_XXS"]
CODES += ["IQ1_S", "IQ1_M", "TQ1_0", "TQ2_0", "NVFP4"]
QUANTISED = ["Q3_K", "Q4_0", "Q4_1", "Q4_K", "Q5_0", "Q5_1", "Q5_K", "Q6_K", "Q8_0", "Q2_K", *CODES]


@pytest.mark.parametrize("kind", FLOATS + QUANTISED)
def test_a_gguf_gives_the_logits_of_its_numbers(kind: str, tmp_path: Path) -> None:
    model = tiny_model("llama", **WIDE, initializer_range=0.05)
    path = save_gguf(tmp_path / "m.gguf", model, kind)
    folder = folder_of(tmp_path / "folder", model)
    backend = load_native(folder, path, kv="f32", threads=1)
    (logits,) = backend.extend([Nodes(backend.open(), PROMPT)])
    with open_gguf(path) as source:
        want = PlainDecoder(source).logits(torch.tensor(PROMPT))
    # Activations are rounded to 8 bits where the weights are quantised.
    limit = 1e-4 if kind in FLOATS else 0.06
    assert float((logits - want).pow(2).mean().sqrt()) < limit * float(want.std())


def random_tree(rng: np.random.Generator, size: int) -> list[int]:
    return [-1] + [int(rng.integers(max(-1, i - 6), i)) for i in range(1, size)]


def check_bitwise(backend: NativeBackend, seed: int, vocab: int = 96) -> None:
    """Rows with random trees, commits and truncations in company, against one-by-one decoding."""
    rng = np.random.default_rng(seed)
    texts = [[int(t) for t in rng.integers(0, vocab, rng.integers(1, 90))] for _ in range(3)]
    rows = [filled(backend, text, chunk=int(rng.integers(1, 70))) for text in texts]
    for _ in range(4):
        trees = [random_tree(rng, int(rng.integers(1, 40))) for _ in rows]
        tokens = [[int(t) for t in rng.integers(0, vocab, len(tree))] for tree in trees]
        order = rng.permutation(len(rows))
        together = backend.extend([Nodes(rows[i], tokens[i], trees[i]) for i in order])
        for i, logits in zip(order, together, strict=True):
            leaf = int(rng.integers(0, len(trees[i])))
            path = path_of(trees[i], leaf)
            alone = plain(backend, texts[i] + [tokens[i][n] for n in path])
            assert torch.equal(logits[path], alone[len(texts[i]) :])
            backend.commit([AcceptedPath(rows[i], path)])
            texts[i] = texts[i] + [tokens[i][n] for n in path]
            if rng.random() < 0.3:
                texts[i] = texts[i][: int(rng.integers(1, len(texts[i])))]
                backend.truncate(rows[i], len(texts[i]))


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("weights", ["auto", "bf16", "int8", "int4"])
def test_a_node_has_the_same_bits_in_any_company(
    weights: str, threads: int, tmp_path: Path
) -> None:
    model = tiny_model("qwen2", max_position_embeddings=2048)
    backend = load_native(folder_of(tmp_path, model), None, weights=weights, threads=threads)
    check_bitwise(backend, seed=threads)


@pytest.mark.parametrize("architecture", ["gemma2", "gemma3", "phi3", "mistral", "qwen3"])
def test_windows_and_norms_keep_the_bits(architecture: str, tmp_path: Path) -> None:
    model = tiny_model(architecture, max_position_embeddings=2048)
    check_bitwise(load_native(folder_of(tmp_path, model), None, threads=2), seed=7)


@pytest.mark.parametrize("kind", QUANTISED)
def test_every_format_keeps_the_bits(kind: str, tmp_path: Path) -> None:
    model = tiny_model("llama", max_position_embeddings=2048, **WIDE)
    path = save_gguf(tmp_path / "m.gguf", model, kind)
    folder = folder_of(tmp_path / "folder", model)
    check_bitwise(load_native(folder, path, threads=2), seed=3)


def test_threads_do_not_change_the_bits(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, tiny_model("llama"))
    found = []
    for threads in (1, 2, 5):
        backend = load_native(folder, None, weights="int4", threads=threads)
        row = filled(backend, PROMPT)
        found.append(backend.extend([Nodes(row, TOKENS, PARENTS)])[0])
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_every_instruction_set_gives_nearly_the_same(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, tiny_model("llama"))
    found = {}
    for isa in extension().instruction_sets():
        backend = load_native(folder, None, kv="f32", isa=isa, threads=1)
        (found[isa],) = backend.extend([Nodes(backend.open(), PROMPT)])
        assert backend.isa == isa
    for logits in found.values():
        torch.testing.assert_close(logits, found["portable"], atol=1e-4, rtol=1e-4)


def test_long_prompts_pass_in_pieces_with_the_same_bits(tmp_path: Path) -> None:
    model = tiny_model("llama", max_position_embeddings=4096)
    backend = load_native(folder_of(tmp_path, model), None, threads=2)
    rng = np.random.default_rng(0)
    text = [int(t) for t in rng.integers(0, 96, 700)]
    (whole,) = backend.extend([Nodes(backend.open(), text)])
    row = filled(backend, text[:333], chunk=111)
    (rest,) = backend.extend([Nodes(row, text[333:])])
    assert torch.equal(whole[333:], rest)
    assert torch.equal(whole[-3:], plain(backend, text)[-3:])


def test_memory_of_rows_is_given_back(tmp_path: Path) -> None:
    backend = load_native(folder_of(tmp_path, tiny_model("llama")), None, threads=1)
    row = filled(backend, PROMPT * 9)
    held = backend.cache_bytes
    assert held > 0
    backend.truncate(row, 3)
    assert 0 < backend.cache_bytes < held
    backend.release(row)
    assert backend.cache_bytes == 0


def test_weights_with_nan_are_refused_at_load(tmp_path: Path) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 3] = float("nan")
    with pytest.raises(NumericalError, match="NaN"):
        load_native(folder_of(tmp_path, model), None)


def test_a_containers_limit_bounds_the_threads(tmp_path: Path) -> None:
    limits = {"150000 100000\n": 1, "400000 100000": 4, "max 100000": 64, "nonsense": 64}
    for text, threads in limits.items():
        (tmp_path / "cpu.max").write_text(text)
        assert native_load._quota(tmp_path / "cpu.max") == threads
    assert native_load._quota(tmp_path / "absent") == 64


@pytest.mark.parametrize("kind", ["Q5_0", "Q8_0", "F32"])
def test_a_drafters_weights_are_four_bits_whatever_the_file_holds(
    kind: str, tmp_path: Path
) -> None:
    file = save_gguf(tmp_path / "m.gguf", tiny_model("qwen2", **WIDE), kind)
    exact = load_native(tmp_path, file, threads=1)
    quick = load_native(tmp_path, file, threads=1, weights="draft")
    assert quick.weight_bytes["0.q"] < exact.weight_bytes["0.q"]
    near, far = plain(exact, PROMPT), plain(quick, PROMPT)
    alike = float(torch.corrcoef(torch.stack([near.flatten(), far.flatten()]))[0, 1])
    assert 0.5 < alike < 1.0 - 1e-6  # random weights magnify what rounding does to them
    check_bitwise(quick, 3)


def test_a_cut_head_scores_the_first_tokens_with_the_same_bits(tmp_path: Path) -> None:
    for tied in (True, False):
        model = tiny_model("llama", tie_word_embeddings=tied)
        folder = folder_of(tmp_path / str(tied), model)
        whole, cut = (load_native(folder, None, threads=1, outputs=n) for n in (None, 48))
        assert (cut.vocab_size, cut.num_embeddings) == (48, whole.vocab_size)
        assert torch.equal(plain(whole, PROMPT)[:, :48], plain(cut, PROMPT))
        assert load_native(folder, None, threads=1, outputs=10**6).vocab_size == whole.vocab_size
        with pytest.raises(ArgumentError, match="outputs"):
            load_native(folder, None, threads=1, outputs=20)
