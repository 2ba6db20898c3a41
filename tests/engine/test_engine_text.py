"""Text in, text out: which prompts are taken, and that callers of one engine do not disturb."""

from __future__ import annotations

import re
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import redwood
from conftest import save_model, tiny_llama, tiny_tokenizer
from redwood.engine.text import Engine
from redwood.errors import ArgumentError, CapacityError, ModelError, RedwoodError
from redwood.sampling import SamplingParams
from redwood.tree import TokenTree


@pytest.fixture(scope="module")
def engine(tiny_model_folder: Path) -> Engine:
    return redwood.load(str(tiny_model_folder), "ngram")


@pytest.mark.parametrize(
    "prompt",
    [
        None,
        5,
        b"abc",
        {"role": "user", "content": "hi"},
        [True, False],
        [1.0, 2.5],
        [1, "a"],
        [None],
        [{"content": "hi"}],
        [{"role": "user"}],
        [{"role": "user", "content": None}],
        "\ud800",
        ["fine", [{"role": "user", "content": "\udfff"}]],
    ],
)
def test_a_prompt_of_the_wrong_kind_is_refused_and_leaves_nothing(
    engine: Engine, prompt: Any
) -> None:
    with pytest.raises(ArgumentError, match="prompt"):
        engine.generate(prompt, max_tokens=2)
    assert not engine.busy


def test_arrays_and_tensors_of_token_ids_are_prompts(engine: Engine) -> None:
    want = engine.generate([3, 4], max_tokens=3).token_ids
    for prompt in (np.array([3, 4]), torch.tensor([3, 4]), [np.int64(3), np.int64(4)]):
        assert engine.generate(prompt, max_tokens=3).token_ids == want
    (batched,) = engine.generate(torch.tensor([[3, 4]]), max_tokens=3)
    assert batched.token_ids == want


@pytest.mark.parametrize("prompt", [[1.7], [True], None, [[3]]])
def test_add_takes_nothing_that_must_be_guessed(engine: Engine, prompt: Any) -> None:
    with pytest.raises(ArgumentError, match="token ids"):
        engine.add(prompt)
    with pytest.raises(ArgumentError, match="SamplingParams"):
        engine.add([3], {"max_tokens": 3})  # type: ignore[arg-type]


def test_a_stream_that_was_never_read_frees_its_request(engine: Engine) -> None:
    stream: Any = engine.stream("abc", max_tokens=5)
    assert engine.busy
    stream.close()
    assert not engine.busy


def test_two_streams_of_one_engine_each_get_their_own_text(engine: Engine) -> None:
    want = ["".join(engine.stream(prompt, max_tokens=12)) for prompt in ("abc", "Tom")]
    streams = [engine.stream(prompt, max_tokens=12) for prompt in ("abc", "Tom")]
    got = ["", ""]
    for pieces in zip_longest(*streams, fillvalue=""):
        got = [text + piece for text, piece in zip(got, pieces, strict=True)]
    assert got == want


def test_generate_takes_no_steps_from_streams_or_from_the_owner_of_the_loop(
    engine: Engine,
) -> None:
    settings = SamplingParams(max_tokens=9)
    want = engine.generate("abc", max_tokens=9).token_ids
    stream = engine.stream("abc", max_tokens=9)
    key = engine.add(engine.encode("abc"), settings)
    assert engine.generate("abc", max_tokens=9).token_ids == want
    assert [token for piece in stream for token in piece.token_ids] == want
    got = []
    for step in engine.step():
        assert step.request == key
        got += step.token_ids
    while engine.busy:
        got += [token for step in engine.step() for token in step.token_ids]
    assert got == want


def test_a_stream_whose_request_was_cancelled_says_so(engine: Engine) -> None:
    stream = engine.stream("abc", max_tokens=9)
    for key in list(engine._requests):
        engine.cancel(key)
    with pytest.raises(RedwoodError, match="dropped"):
        next(stream)


@pytest.mark.parametrize("name", ["budget", "max_rows", "capacity"])
@pytest.mark.parametrize("value", ["8", 2.5, True, 0, -1])
def test_sizes_that_are_no_counts_are_refused(
    tiny_model_folder: Path, name: str, value: Any
) -> None:
    with pytest.raises((ArgumentError, CapacityError), match=name):
        redwood.load(str(tiny_model_folder), **{name: value})


@pytest.mark.parametrize("drafter", [5, [None], {}, True])
def test_a_drafter_that_cannot_draft_is_refused(tiny_model_folder: Path, drafter: Any) -> None:
    with pytest.raises(ArgumentError, match="drafter"):
        redwood.load(str(tiny_model_folder), drafter)


class _Stranger:
    """A drafter of someone else's that proposes one fixed tree."""

    name, draws = "stranger", False

    def __init__(self, tokens: list[int], own_root: bool) -> None:
        self._tokens, self._own_root = tokens, own_root

    def propose(self, contexts: Any, budgets: Any) -> list[TokenTree]:
        roots = [[] if self._own_root else c.token_ids[-1:] for c in contexts]
        return [TokenTree.chain([*root, *self._tokens]) for root in roots]

    def release(self, key: int) -> None:
        """Holds nothing."""


@pytest.mark.parametrize(
    ("tokens", "own_root", "what"),
    [([7, 8], True, "root"), ([7] * 40, False, "40|41"), ([300], False, "beyond 300 tokens")],
)
def test_a_draft_that_does_not_fit_the_text_is_left_out(
    tiny_model_folder: Path,
    tokens: list[int],
    own_root: bool,
    what: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    engine = redwood.load(str(tiny_model_folder), _Stranger(tokens, own_root))
    plain = engine.generate([3, 4], max_tokens=5, speculate=False)
    caplog.clear()
    assert engine.generate([3, 4], max_tokens=5).token_ids == plain.token_ids
    assert not engine.busy
    (said,) = [entry.getMessage() for entry in caplog.records]
    assert re.search(what, said)


@pytest.mark.parametrize(
    ("backend", "said"),
    [("native", r"lacks the tensor .*up_proj"), ("eager", r"lacks 1 of its weights.*up_proj")],
)
def test_a_model_without_some_of_its_weights_is_refused(
    tmp_path: Path, backend: str, said: str
) -> None:
    folder = save_model(tmp_path / "m", tiny_llama(), tiny_tokenizer())
    weights = load_file(folder / "model.safetensors")
    weights.pop("model.layers.1.mlp.up_proj.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=said):
        redwood.load(str(folder), backend=backend)


def test_a_config_that_contradicts_itself_is_refused(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "m", tiny_llama(), tiny_tokenizer())
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"hidden_size": 32', '"hidden_size": "32"'))
    with pytest.raises(ModelError, match=r"config\.json"):
        redwood.load(str(folder))


def test_the_smallest_capacity_still_answers(tiny_model_folder: Path) -> None:
    engine = redwood.load(str(tiny_model_folder), capacity=2, budget=1)
    assert len(engine.generate([5], max_tokens=9).token_ids) == 1


def test_the_loop_can_be_the_callers_own(tiny_model_folder: Path) -> None:
    engine = redwood.load(tiny_model_folder, "ngram", dtype=torch.float32, device="cpu")
    want = engine.generate("Tom went", max_tokens=12)
    key = engine.add("Tom went", redwood.SamplingParams(max_tokens=12))
    text, tokens = "", []
    while engine.busy:
        for step in engine.step():
            assert step.request == key
            text, tokens = text + step.text, tokens + step.token_ids
    assert (text, tokens) == (want.text, want.token_ids)
    with pytest.raises(ArgumentError, match="target"):
        redwood.load(None)  # type: ignore[arg-type]


def test_a_token_that_the_model_lacks_is_refused_in_prompts_and_no_guess(
    tiny_model_folder: Path,
) -> None:
    engine = redwood.load(str(tiny_model_folder), "ngram", backend="eager")
    engine.tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    assert len(engine.tokenizer) > engine.target.vocab_size
    for prompt in ("a <image> b", [{"role": "user", "content": "a <image> b"}]):
        with pytest.raises(ArgumentError, match="holds <image>, a token that this model does not"):
            engine.encode(prompt)
    plain = engine.generate("Tom went", max_tokens=6, temperature=0).text
    guess = f"<image>{plain}<image>"
    assert engine.generate("Tom went", max_tokens=6, temperature=0, prediction=guess).text == plain
