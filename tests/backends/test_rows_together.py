"""Several rows in one forward: no position for padding, and nobody sees anybody else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_backends import ARCHITECTURES, PARENTS, PROMPT, TOKENS, _filled, _random_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM

from conftest import tiny_llama
from graph_kit import Tape
from redwood.backends.base import AcceptedPath, Backend, Nodes
from redwood.backends.cuda_graph.backend import CudaGraphBackend
from redwood.backends.eager.backend import EagerBackend, Together
from redwood.backends.load import wrap_model
from redwood.engine.engine import RowEngine
from redwood.sampling import SamplingParams

WAYS: list[Together] = ["flat", "padded", "apart"]


def _close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, atol=2e-4, rtol=2e-4)


def _shapes(model: Any) -> list[tuple[int, ...]]:
    """Grows with every forward: lines and columns of its token ids."""
    seen: list[tuple[int, ...]] = []
    model.model.embed_tokens.register_forward_pre_hook(
        lambda _, given: seen.append(tuple(given[0].shape))
    )
    return seen


def _config(**changes: Any) -> LlamaConfig:
    return LlamaConfig(**{**tiny_llama().config.to_dict(), **changes})


@pytest.mark.parametrize("graphs", [False, True])
def test_a_prompt_beside_decoding_rows_costs_its_tokens_alone(graphs: bool) -> None:
    model = tiny_llama(max_position_embeddings=2048)
    backend: Backend = wrap_model(model)
    if graphs:
        backend = CudaGraphBackend(wrap_model(model), rows=32, recorder=Tape)
    engine = RowEngine(backend, prefill_beside=512)
    for i in range(31):
        engine.add([5, 9, i + 3], SamplingParams(max_tokens=40))
    engine.step()
    engine.add([7] * 1500, SamplingParams(max_tokens=4))
    shapes = _shapes(model)
    engine.step()
    assert shapes == [(1, 31 + 512)]


@pytest.mark.parametrize("kind", sorted(ARCHITECTURES))
def test_stock_architectures_need_no_padding(kind: str) -> None:
    assert wrap_model(_random_model(kind)).together == "flat"


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("together", WAYS)
def test_rows_of_all_lengths_get_what_they_get_alone(together: Together, graphs: bool) -> None:
    eager = wrap_model(tiny_llama())
    eager.together = together
    backend: Any = CudaGraphBackend(eager, nodes=(1,), recorder=Tape) if graphs else eager
    rows = [_filled(backend, PROMPT[:n]) for n in (1, 4, 7, 10, 3)]
    wanted: list[int | None] = [None, 1, 0, 3, None]
    trees = [
        Nodes(row, TOKENS[:n], PARENTS[:n], logits)
        for row, n, logits in zip(rows, (8, 5, 2, 6, 1), wanted, strict=True)
    ]
    got = backend.extend(trees)
    for row, tree, logits, n in zip(rows, trees, got, (1, 4, 7, 10, 3), strict=True):
        alone = wrap_model(tiny_llama())
        (want,) = alone.extend([tree._replace(row=_filled(alone, PROMPT[:n]))])
        _close(logits, want)
        assert logits.shape == want.shape
        backend.commit([AcceptedPath(row, [0])])
    for logits, row in zip(backend.extend([Nodes(row, [77]) for row in rows]), rows, strict=True):
        assert logits.shape == (1, 300) and backend.length(row) > 1


class LongestOfLine(LlamaForCausalLM):
    """Looks at the longest text of a line of token ids: right in a row, wrong across rows."""

    def forward(self, input_ids: Any = None, position_ids: Any = None, **given: Any) -> Any:  # type: ignore[override]
        embeds = self.model.embed_tokens(input_ids)
        if position_ids is not None:
            far = position_ids.amax(1, keepdim=True) >= 100
            embeds = embeds * torch.where(far, 3.0, 1.0)[..., None]
        return super().forward(inputs_embeds=embeds, position_ids=position_ids, **given)


def test_a_model_that_takes_a_line_for_one_text_is_padded_little() -> None:
    torch.manual_seed(0)
    model = LongestOfLine(_config()).eval()
    backend = wrap_model(model)
    assert backend.together == "padded"
    short, long = _filled(backend, PROMPT), _filled(backend, [9] * 120)
    (want,) = backend.extend([Nodes(short, TOKENS, PARENTS)])
    backend.truncate(short, len(PROMPT))
    shapes = _shapes(model)
    tree, _ = backend.extend([Nodes(short, TOKENS, PARENTS), Nodes(long, [9] * 60, num_logits=1)])
    _close(tree, want)
    assert sum(lines * columns for lines, columns in shapes) < 2 * (len(TOKENS) + 60)


class LongestOfAll(LlamaForCausalLM):
    """Looks at the longest text of the whole forward, without asking the device for a number."""

    def forward(self, input_ids: Any = None, position_ids: Any = None, **given: Any) -> Any:  # type: ignore[override]
        embeds = self.model.embed_tokens(input_ids)
        if position_ids is not None:
            embeds = embeds * torch.where(position_ids.amax() >= 100, 3.0, 1.0)
        return super().forward(inputs_embeds=embeds, position_ids=position_ids, **given)


@pytest.mark.parametrize("graphs", [False, True])
def test_a_model_that_looks_at_all_rows_sees_one_at_a_time(graphs: bool) -> None:
    torch.manual_seed(0)
    eager = wrap_model(LongestOfAll(_config()).eval())
    assert eager.together == "apart"
    made: Backend = CudaGraphBackend(eager, recorder=Tape) if graphs else eager
    short, long = _filled(made, PROMPT), _filled(made, [9] * 120)
    tree, _ = made.extend([Nodes(short, TOKENS, PARENTS), Nodes(long, [9])])
    (want,) = eager.extend([Nodes(_filled(eager, PROMPT), TOKENS, PARENTS)])
    _close(tree, want)


def _longrope() -> Phi3ForCausalLM:
    torch.manual_seed(0)
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 4,
        "long_factor": [8.0] * 4,
        "original_max_position_embeddings": 64,
    }
    config = Phi3Config(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        original_max_position_embeddings=64,
        rope_parameters=rope,
        initializer_range=0.4,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return Phi3ForCausalLM(config).eval()


def test_rotary_angles_that_follow_the_longest_row_keep_rows_apart() -> None:
    backend = wrap_model(_longrope())
    assert backend.together == "apart"
    short, long = _filled(backend, PROMPT), _filled(backend, [9] * 120)
    (want,) = backend.extend([Nodes(short, TOKENS, PARENTS)])
    backend.truncate(short, len(PROMPT))
    tree, _ = backend.extend([Nodes(short, TOKENS, PARENTS), Nodes(long, [9])])
    assert torch.equal(tree, want)


class NumberOfLogits(LlamaForCausalLM):
    """Knows how many of the last logits to keep, but not which."""

    def forward(self, *args: Any, logits_to_keep: Any = 0, **given: Any) -> Any:  # type: ignore[override]
        return super().forward(*args, logits_to_keep=int(logits_to_keep), **given)


def test_a_model_that_cannot_name_its_logits_is_padded() -> None:
    model = NumberOfLogits(_config()).eval()
    backend = wrap_model(model)
    assert backend.together == "padded"
    rows = [_filled(backend, PROMPT), _filled(backend, PROMPT[:3])]
    got = backend.extend([Nodes(rows[0], TOKENS, num_logits=1), Nodes(rows[1], TOKENS[:2])])
    assert [len(logits) for logits in got] == [1, 2]


def test_what_was_found_holds_for_a_borrowed_model_and_on_graphs() -> None:
    from redwood.hf.model import borrowed

    model = _longrope()
    for _ in range(2):
        with borrowed(model) as made:
            assert made.together == "apart"
    torch.manual_seed(0)
    eager = wrap_model(LongestOfLine(_config()).eval())
    graphs = CudaGraphBackend(eager, nodes=(1,), recorder=Tape)
    short, long = _filled(graphs, PROMPT), _filled(graphs, [9] * 120)
    tree, _ = graphs.extend([Nodes(short, TOKENS, PARENTS), Nodes(long, [9])])
    (want,) = eager.extend([Nodes(_filled(eager, PROMPT), TOKENS, PARENTS)])
    _close(tree, want)


@pytest.mark.parametrize("layers", [2, 6])
def test_a_commit_of_several_rows_takes_one_index_to_the_device(
    layers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend: EagerBackend = wrap_model(tiny_llama(layers=layers))
    rows = [_filled(backend, PROMPT[:n]) for n in (4, 9, 6)]
    backend.extend([Nodes(row, TOKENS, PARENTS) for row in rows])
    sent = 0
    usual = Tensor.to

    def to(self: Tensor, *args: Any, **given: Any) -> Tensor:
        nonlocal sent
        sent += 1
        return usual(self, *args, **given)

    monkeypatch.setattr(Tensor, "to", to)
    paths = [[0, 2, 4], [0, 1], [0, 2, 5]]
    backend.commit([AcceptedPath(row, path) for row, path in zip(rows, paths, strict=True)])
    assert sent == 1
    monkeypatch.undo()
    got = backend.extend([Nodes(row, [77]) for row in rows])
    for n, path, logits in zip((4, 9, 6), paths, got, strict=True):
        text = [*PROMPT[:n], *(TOKENS[i] for i in path)]
        _close(logits, backend.extend([Nodes(_filled(backend, text), [77])])[0])
