"""Conformance list of the backends, and the architectures that the eager one serves."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from conftest import save_model, tiny_llama, tiny_tokenizer
from graph_kit import Tape
from offload_kit import offloaded
from parallel_kit import mirrored
from redwood.backends.base import AcceptedPath, Backend, Nodes
from redwood.backends.cuda_graph.backend import with_graphs
from redwood.backends.load import load_eager, wrap_model
from redwood.backends.native.load import load_native
from redwood.errors import (
    ArgumentError,
    CapacityError,
    ModelError,
    NumericalError,
    UnsupportedError,
)

PROMPT = [5, 9, 17, 33, 65, 129, 2, 77, 54, 201]
TOKENS = [3, 14, 15, 92, 65, 35, 89, 79]
PARENTS = [-1, 0, 0, 1, 2, 2, 3, 6]


def _native(model: Any) -> Backend:
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return load_native(Path(folder), None, kv="f32", threads=2)


def _graphs(model: Any) -> Backend:
    return with_graphs(wrap_model(model), recorder=Tape)


# One entry per backend: a function from a Transformers model to the backend under test.
BACKENDS: dict[str, Callable[[Any], Backend]] = {
    "cuda_graph": _graphs,
    "eager": wrap_model,
    "native": _native,
    "offload": offloaded,
    "parallel": mirrored,
}


def _path(node: int) -> list[int]:
    path: list[int] = []
    while node >= 0:
        path.append(TOKENS[node])
        node = PARENTS[node]
    return path[::-1]


def _filled(backend: Backend, tokens: list[int], chunk: int = 1000) -> int:
    row = backend.open()
    for start in range(0, len(tokens), chunk):
        part = tokens[start : start + chunk]
        backend.extend([Nodes(row, part, num_logits=1)])
        backend.commit([AcceptedPath(row, range(len(part)))])
    return row


def _plain(model: Any, tokens: list[int]) -> torch.Tensor:
    """Logits after the last token, from the stock module."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1]
    model.set_attn_implementation(before)
    return logits


@pytest.fixture(params=sorted(BACKENDS))
def made(request: pytest.FixtureRequest) -> tuple[Any, Backend]:
    model = tiny_llama()
    return model, BACKENDS[request.param](model)


def test_tree_logits_equal_those_of_every_path(made: tuple[Any, Backend]) -> None:
    model, backend = made
    row = _filled(backend, PROMPT)
    (logits,) = backend.extend([Nodes(row, TOKENS, PARENTS)])
    assert logits.shape == (len(TOKENS), backend.vocab_size)
    for node in range(len(TOKENS)):
        torch.testing.assert_close(
            logits[node], _plain(model, PROMPT + _path(node)), atol=1e-4, rtol=1e-4
        )


def test_a_tree_grown_level_by_level_has_the_same_logits(made: tuple[Any, Backend]) -> None:
    _, backend = made
    row, other = _filled(backend, PROMPT), _filled(backend, PROMPT)
    (whole,) = backend.extend([Nodes(row, TOKENS, PARENTS)])
    parts = [
        backend.extend([Nodes(other, TOKENS[a:b], PARENTS[a:b])])[0]
        for a, b in ((0, 1), (1, 3), (3, 8))
    ]
    torch.testing.assert_close(torch.cat(parts), whole, atol=1e-4, rtol=1e-4)


def test_commit_equals_recomputation(made: tuple[Any, Backend]) -> None:
    model, backend = made
    row = _filled(backend, PROMPT)
    backend.extend([Nodes(row, TOKENS, PARENTS)])
    kept = [0, 2, 5]
    backend.commit([AcceptedPath(row, kept)])
    text = PROMPT + [TOKENS[node] for node in kept]
    assert backend.length(row) == len(text)
    (logits,) = backend.extend([Nodes(row, [7, 8], [-1, -1])])
    torch.testing.assert_close(logits[1], _plain(model, [*text, 8]), atol=1e-4, rtol=1e-4)


def test_many_commits_and_growth_of_slots_keep_the_text(made: tuple[Any, Backend]) -> None:
    model, backend = made
    row, text = _filled(backend, PROMPT, chunk=3), list(PROMPT)
    for step in range(12):
        backend.extend([Nodes(row, [(t + step) % 300 for t in TOKENS], PARENTS)])
        kept = [[0, 2, 4], [0, 1, 3, 6, 7], [0]][step % 3]
        backend.commit([AcceptedPath(row, kept)])
        text += [(TOKENS[node] + step) % 300 for node in kept]
    (logits,) = backend.extend([Nodes(row, [1])])
    torch.testing.assert_close(logits[0], _plain(model, [*text, 1]), atol=1e-3, rtol=1e-3)


def test_ragged_rows_equal_single_rows(made: tuple[Any, Backend]) -> None:
    _, backend = made
    prompts = [PROMPT, PROMPT[:3], PROMPT * 4]
    trees: list[tuple[list[int], list[int] | None]] = [
        (TOKENS, PARENTS),
        ([9], None),
        (TOKENS[:4], [-1, 0, 1, 0]),
    ]
    rows = [_filled(backend, prompt) for prompt in prompts]
    together = backend.extend([Nodes(row, *tree) for row, tree in zip(rows, trees, strict=True)])
    for prompt, tree, logits in zip(prompts, trees, together, strict=True):
        (alone,) = backend.extend([Nodes(_filled(backend, prompt), *tree)])
        torch.testing.assert_close(logits, alone, atol=1e-4, rtol=1e-4)


def test_prefill_in_chunks_equals_prefill_at_once(made: tuple[Any, Backend]) -> None:
    _, backend = made
    a, b = _filled(backend, PROMPT * 5, chunk=7), _filled(backend, PROMPT * 5)
    (x,), (y,) = backend.extend([Nodes(a, [4])]), backend.extend([Nodes(b, [4])])
    torch.testing.assert_close(x, y, atol=1e-4, rtol=1e-4)


def test_truncate_forgets_and_continues(made: tuple[Any, Backend]) -> None:
    model, backend = made
    row = _filled(backend, PROMPT)
    backend.extend([Nodes(row, TOKENS, PARENTS)])
    backend.truncate(row, 4)
    assert backend.length(row) == 4
    (logits,) = backend.extend([Nodes(row, [8])])
    torch.testing.assert_close(logits[0], _plain(model, [*PROMPT[:4], 8]), atol=1e-4, rtol=1e-4)


def test_only_the_logits_asked_for_come_back(made: tuple[Any, Backend]) -> None:
    _, backend = made
    row, other = _filled(backend, PROMPT), _filled(backend, PROMPT[:2])
    some, none = backend.extend(
        [Nodes(row, TOKENS, PARENTS, num_logits=2), Nodes(other, [1, 2], num_logits=0)]
    )
    assert some.shape == (2, backend.vocab_size) and none.shape == (0, backend.vocab_size)


def test_wrong_calls_are_refused_and_change_nothing(made: tuple[Any, Backend]) -> None:
    _, backend = made
    row = _filled(backend, PROMPT)
    backend.extend([Nodes(row, TOKENS, PARENTS)])
    for bad in (
        lambda: backend.extend([Nodes(row, [1], [99])]),
        lambda: backend.extend([Nodes(row, [], [])]),
        lambda: backend.extend([Nodes(row, [1, 2], [-1])]),
        lambda: backend.extend([Nodes(row, [1]), Nodes(row, [2])]),
        lambda: backend.extend([Nodes(row + 100, [1])]),
        lambda: backend.commit([AcceptedPath(row, [1])]),
        lambda: backend.commit([AcceptedPath(row, [0, 3])]),
        lambda: backend.truncate(row, 999),
    ):
        with pytest.raises(ArgumentError):
            bad()
    with pytest.raises(CapacityError, match="capacity"):
        backend.extend([Nodes(row, [1] * 300)])
    backend.commit([AcceptedPath(row, [0, 1, 3])])
    assert backend.length(row) == len(PROMPT) + 3
    backend.release(row)
    with pytest.raises(ArgumentError, match="not open"):
        backend.length(row)


ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 8},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "gemma2": {"head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16},
    "gemma3_text": {"head_dim": 16, "sliding_window": 8, "num_hidden_layers": 6},
    "phi3": {"pad_token_id": 0},
    "gpt2": {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 128},
    "gpt_neox": {},
}
EXPERTS: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
}


def _random_model(kind: str) -> Any:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(
        kind,
        **{
            "vocab_size": 300,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128,
            "bos_token_id": 0,
            "eos_token_id": 1,
            **{**ARCHITECTURES, **EXPERTS}[kind],
        },
    )
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(0, 0.3)
    return model


@pytest.mark.parametrize("kind", sorted(ARCHITECTURES))
def test_every_architecture_serves_trees(kind: str) -> None:
    model = _random_model(kind)
    backend = wrap_model(model)
    prompt = PROMPT * 2  # longer than the windows
    row = _filled(backend, prompt, chunk=6)
    (logits,) = backend.extend([Nodes(row, TOKENS, PARENTS)])
    for node in range(len(TOKENS)):
        torch.testing.assert_close(
            logits[node], _plain(model, prompt + _path(node)), atol=2e-4, rtol=2e-4
        )
    backend.commit([AcceptedPath(row, [0, 1, 3, 6])])
    (after,) = backend.extend([Nodes(row, [8])])
    text = prompt + _path(6)
    torch.testing.assert_close(after[0], _plain(model, [*text, 8]), atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("kind", sorted({**ARCHITECTURES, **EXPERTS}))
def test_every_architecture_streams(kind: str) -> None:
    model = _random_model(kind)
    eager, streamed = wrap_model(model), offloaded(model)
    for backend in (eager, streamed):
        _filled(backend, PROMPT * 2, chunk=6)
    (want,) = eager.extend([Nodes(1, TOKENS, PARENTS)])
    for _ in range(2):  # the second time in the order in which the first one used its weights
        row = _filled(streamed, PROMPT * 2, chunk=6)
        (got,) = streamed.extend([Nodes(row, TOKENS, PARENTS)])
        torch.testing.assert_close(got, want, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_every_dtype_serves_trees(dtype: str, tiny_model_folder: Path) -> None:
    backend = load_eager(tiny_model_folder, dtype=dtype)
    row = _filled(backend, PROMPT)
    (logits,) = backend.extend([Nodes(row, TOKENS, PARENTS)])
    other = _filled(backend, PROMPT)
    (path,) = backend.extend([Nodes(other, _path(7))])
    spread = float(logits.float().std())
    limit = {"bfloat16": 0.2, "float16": 0.03, "float32": 1e-4}[dtype]
    assert float((logits[7] - path[-1]).abs().max()) < limit * spread


def test_packed_layers_give_the_stock_logits(tiny_model_folder: Path) -> None:
    backend = load_eager(tiny_model_folder)
    row = _filled(backend, PROMPT)
    (logits,) = backend.extend([Nodes(row, [8])])
    torch.testing.assert_close(logits[0], _plain(tiny_llama(), [*PROMPT, 8]), atol=1e-4, rtol=1e-4)


def test_models_that_cannot_be_exact_are_refused_with_the_reason() -> None:
    bloom = transformers.BloomForCausalLM(
        transformers.BloomConfig(vocab_size=300, hidden_size=32, n_layer=1, n_head=4)
    ).eval()
    with pytest.raises(UnsupportedError, match="Bloom"):
        wrap_model(bloom)
    rwkv = transformers.RwkvForCausalLM(
        transformers.RwkvConfig(vocab_size=300, hidden_size=32, num_hidden_layers=2)
    ).eval()
    with pytest.raises(UnsupportedError, match="RwkvForCausalLM does not use .* interface, nor"):
        wrap_model(rwkv)
    t5 = transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=300, d_model=32, d_ff=64, num_layers=1, num_heads=4)
    )
    with pytest.raises(UnsupportedError, match="encoder-decoder"):
        wrap_model(t5)


def test_a_refused_model_is_left_as_it_was() -> None:
    model = tiny_llama()
    before = model.config._attn_implementation
    original = model.forward
    model.forward = lambda **given: original(**{**given, "position_ids": None})
    with pytest.raises(UnsupportedError):
        wrap_model(model)
    assert model.config._attn_implementation == before


def test_weights_with_nan_are_refused_at_load() -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight[3, 3] = float("nan")
    with pytest.raises(NumericalError, match="NaN"):
        wrap_model(model)


def test_bad_names_and_numbers_are_refused(tiny_model_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="dtype"):
        load_eager(tiny_model_folder, dtype="int3")
    with pytest.raises(ArgumentError, match="device"):
        load_eager(tiny_model_folder, device="abacus")
    with pytest.raises(CapacityError, match="capacity"):
        load_eager(tiny_model_folder, capacity=100000)
    with pytest.raises(ModelError, match="config"):
        load_eager(tmp_path)


def test_a_truncated_weight_file_is_one_clear_error(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "broken", tiny_llama(), tiny_tokenizer())
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError, match="does not load"):
        load_eager(folder)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_cuda_serves_trees(dtype: str, tiny_model_folder: Path) -> None:
    backend = load_eager(tiny_model_folder, dtype=dtype, device="cuda")
    row = _filled(backend, PROMPT)
    (logits,) = backend.extend([Nodes(row, TOKENS, PARENTS)])
    (path,) = backend.extend([Nodes(_filled(backend, PROMPT), _path(7))])
    limit = {"bfloat16": 0.2, "float16": 0.03, "float32": 1e-2}[dtype]
    assert float((logits[7] - path[-1]).abs().max()) < limit * float(logits.float().std())
