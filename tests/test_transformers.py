"""What of Transformers moves: found where it is now, tried where it is new, refused by name."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from transformers import Cache, LlamaForCausalLM
from transformers.generation import (
    EncoderNoRepeatNGramLogitsProcessor,
    PrefixConstrainedLogitsProcessor,
)

from conftest import tiny_llama
from hf_kit import FAMILIES, LOOP, _batch
from redwood import hf
from redwood.errors import UnsupportedError
from redwood.models import _transformers as moving

SOURCE = Path(__file__).parents[1] / "src" / "redwood"
MOVES = re.compile(
    r"past_key_values|use_cache=\w+[,)]|\b_attn_implementation|sub_configs|_pad_token_tensor"
    r"|_is_user_defined|_prefix_allowed|DistributedConfig|GgufConfig|base_model_.p_plan"
    r"|(?:from|import) transformers\.(?:integrations|distributed|cache_utils|modeling)"
    r"|DynamicCache|(?:conv|recurrent)_state\b|layer_idx\b"
    r"|(?:\.|getattr\(\w+, \")(?:chunk_size\b|time_step_limit)"  # a config.json may name them
)
MAY = {"_transformers.py", "_transformers_states.py"}


def test_one_file_alone_names_what_moves() -> None:
    named = {
        file.name: found
        for file in SOURCE.rglob("*.py")
        if (found := MOVES.findall(file.read_text())) and file.name not in MAY
    }
    assert named == {}


# Versions


@pytest.mark.parametrize(
    ("version", "told"),
    [
        (moving.OLDEST_TESTED, False),
        (moving.NEWEST_TESTED, False),
        (moving.NEWEST_TESTED + ".post1", False),
        ("5.9.3", True),
        ("5.99.0.dev0", True),
        ("6.0.0", True),
    ],
)
def test_a_version_that_was_not_tested_is_told_once_in_one_line_and_tried(
    version: str, told: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(transformers, "__version__", version)
    moving.check_version.cache_clear()
    with caplog.at_level(logging.WARNING, "redwood"):
        for _ in range(2):
            hf.tree_generate(tiny_llama(), torch.tensor([LOOP]), max_new_tokens=2)
    moving.check_version.cache_clear()
    said = [record.getMessage() for record in caplog.records if record.name.startswith("redwood")]
    assert len(said) == told
    assert all(f"Transformers {version} is outside" in line and "\n" not in line for line in said)


# Forwards


class _Oldest:
    def forward(self, input_ids: Any, past_key_values: Any = None) -> Any: ...


class _Newest:
    def forward(self, input_ids: Any, cache: Any = None, past_key_values: Any = None) -> Any: ...


class _Renamed:
    def forward(self, input_ids: Any, use_cache: bool = True, kv: Cache | None = None) -> Any: ...


class _Wrapped:
    def forward(self, *args: Any, **kwargs: Any) -> Any: ...
    def prepare_inputs_for_generation(self, input_ids: Any, cache: Any = None) -> Any: ...


class _Without:
    def forward(self, input_ids: Any, use_cache: bool = True) -> Any: ...


@pytest.mark.parametrize(
    ("model", "name"),
    [(_Oldest, "past_key_values"), (_Newest, "cache"), (_Renamed, "kv"), (_Wrapped, "cache")],
)
def test_the_cache_goes_in_by_the_name_that_forward_has(model: Any, name: str) -> None:
    assert moving.cache_argument(model()) == name


def test_a_forward_without_a_cache_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="_Without takes no cache"):
        moving.cache_argument(_Without())


@pytest.mark.parametrize("family", FAMILIES)
def test_forwards_print_no_warning(family: str, capfd: pytest.CaptureFixture[str]) -> None:
    model = FAMILIES[family]()
    capfd.readouterr()
    hf.tree_generate(model, **_batch([LOOP, [4, 5]]), max_new_tokens=3)
    assert capfd.readouterr() == ("", "")


def test_arguments_that_a_forward_does_not_have_are_left_out() -> None:
    class Bare:
        def forward(self, input_ids: Any, position_ids: Any, cache: Any) -> Any: ...

        def __call__(self, **given: Any) -> Any:
            assert set(given) == {"input_ids", "position_ids", "cache"}
            return SimpleNamespace(logits=torch.arange(10.0).view(1, 5, 2))

    ids, handle = torch.zeros(1, 5, dtype=torch.int64), moving.CacheHandle()
    assert moving.cached_logits(Bare(), ids, ids, handle, 2).tolist() == [[[6.0, 7.0], [8.0, 9.0]]]


# What generate prepares


class _Later(LlamaForCausalLM):
    """As a later release may be: another name for the cache, and one more input prepared."""

    def generate(self, inputs: Any = None, *, custom_generate: Any = None, **options: Any) -> Any:
        def prepared(model: Any, input_ids: Any, *others: Any, **given: Any) -> Any:
            for name in ("cache", "past_key_values"):
                if name in given:
                    given["kv"] = given.pop(name)
            given.setdefault("places", torch.arange(input_ids.shape[1]))
            return custom_generate(model, input_ids, *others, **given)

        return super().generate(inputs, custom_generate=custom_generate and prepared, **options)

    def forward(
        self, input_ids: Any = None, kv: Cache | None = None, places: Any = None, **given: Any
    ) -> Any:
        if kv is not None:
            given[moving.cache_argument(tiny_llama())] = kv
        return super().forward(input_ids=input_ids, **given)


def test_inputs_that_generate_prepares_by_itself_are_no_reason_to_refuse() -> None:
    plain, later = tiny_llama(), _Later(tiny_llama().config).eval()
    later.load_state_dict(plain.state_dict())
    inputs = _batch([LOOP, [2, 3, 2, 3]])
    expected = plain.generate(**inputs, max_new_tokens=8)
    assert torch.equal(expected, hf.tree_generate(later, **inputs, max_new_tokens=8))
    usual, other = torch.arange(len(LOOP)), torch.zeros(len(LOOP), dtype=torch.int64)
    hf.tree_generate(later, **inputs, max_new_tokens=2, places=usual)
    with pytest.raises(UnsupportedError, match="places is not supported"):
        hf.tree_generate(later, **inputs, max_new_tokens=2, places=other)


def test_a_cache_that_was_given_is_found_under_any_name() -> None:
    held = transformers.DynamicCache(config=tiny_llama().config)
    config, ids = transformers.GenerationConfig(), torch.tensor([LOOP])
    assert moving.added_inputs(None, ids, config, {"kv": held, "use_cache": True}) == []
    held.update(torch.zeros(1, 2, 3, 8), torch.zeros(1, 2, 3, 8), 0)
    assert moving.added_inputs(None, ids, config, {"kv": held}) == ["kv"]


def test_the_padding_token_is_that_which_generate_chose() -> None:
    config = transformers.GenerationConfig(pad_token_id=3)
    assert moving.pad_id(config) == 3
    config._pad_token_tensor = torch.tensor(5)
    assert moving.pad_id(config) == 5
    assert moving.pad_id(transformers.GenerationConfig()) is None


# Processors


def test_repeated_prompts_have_the_constraint_of_their_prompt() -> None:
    asked = []

    def allowed(prompt: int, text: torch.Tensor) -> list[int]:
        asked.append(prompt)
        return [prompt]

    processor = PrefixConstrainedLogitsProcessor(allowed, 2)  # 2 rows a prompt
    for row in range(4):
        own = moving.processor_of_row(processor, row, 4)
        scores = own(torch.tensor([[1]]), torch.zeros(1, 3))
        assert scores.isfinite().tolist() == [[token == row // 2 for token in range(3)]]
    assert asked == [0, 0, 1, 1]


def test_a_processor_that_keeps_its_rows_elsewhere_is_refused() -> None:
    processor = EncoderNoRepeatNGramLogitsProcessor(1, torch.tensor([[1, 2], [3, 4]]))
    own = moving.processor_of_row(processor, 1, 2)
    assert len(own.generated_ngrams) == 1
    del processor.generated_ngrams
    with pytest.raises(UnsupportedError, match="EncoderNoRepeatNGram.* has no generated_ngrams"):
        moving.processor_of_row(processor, 1, 2)


# Places and fields


def test_what_moved_to_another_module_is_found_there() -> None:
    found = moving._find("is_fsdp_managed_module", ("transformers.nowhere", *moving._FSDP))
    assert found(tiny_llama()) is False
    with pytest.raises(UnsupportedError, match="has no is_gone where it was"):
        moving._find("is_gone", moving._FSDP)


def test_versions_that_cannot_split_a_model_say_which_can(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import distributed

    class Whole:
        def __init__(self) -> None: ...

    class Split:
        def __init__(self, tp_size: int = 1, pp_size: int = 1) -> None:
            self.sizes = tp_size, pp_size

    monkeypatch.setattr(distributed, "DistributedConfig", Split)
    for parallel, sizes in (("tensor", (3, 1)), ("pipeline", (1, 3))):
        assert moving.split_options(parallel, 3)["distributed_config"].sizes == sizes
    monkeypatch.setattr(distributed, "DistributedConfig", Whole)
    for parallel in ("tensor", "pipeline"):
        said = f"has no {parallel} parallel loading of this kind: pip .*'transformers>=5.17'$"
        with pytest.raises(UnsupportedError, match=said):
            moving.split_options(parallel, 3)
