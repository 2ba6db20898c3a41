"""One model over several processes: the same tokens, one tree, and clear ends."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file

import parallel_kit as kit
from conftest import save_model, tiny_llama, tiny_tokenizer
from gemma_kit import gemma_model
from hybrids_kit import hybrid_model
from mambas_kit import MAMBAS, mamba_model
from redwood.backends.eager.stock import has_recurrent_layers
from redwood.backends.parallel.load import _refuse
from redwood.errors import UnsupportedError

kit.need_parallel_loading()

# Single tokens, repeated ones for the n-grams, and rows of different lengths.
PROMPTS = [[5, 9, 17, 33, 65, 5, 9, 17], [2, 77], [40, 41, 42, 40, 41, 42, 40, 41]]
PARAMS: list[dict[str, Any]] = [
    {"temperature": 0.0, "max_tokens": 14},
    {"temperature": 0.8, "seed": 3, "max_tokens": 14},
    {"temperature": 0.8, "seed": 4, "max_tokens": 14, "verifier": "traversal"},
]
TREE = [-1, 0, 0, 0, 1, 1, 2, 4, 4, 7]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders of random models by name; "near" is close enough to draft for "llama"."""
    tokenizer, made = tiny_tokenizer(), {"llama": tiny_llama(layers=3), "other": tiny_llama(5, 3)}
    near = tiny_llama(layers=3)
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in near.parameters():
            weight.add_(torch.randn_like(weight) * 0.03)
    made["near"] = near
    small = dict(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.4,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    for name, more in (
        ("Qwen2", {}),
        ("Gemma2", {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 128}),
        ("Granite", {"embedding_multiplier": 3.0}),
    ):
        torch.manual_seed(2)
        config = getattr(transformers, f"{name}Config")(**{**small, **more})
        made[name.lower()] = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    folder = tmp_path_factory.mktemp("models")
    return {n: str(save_model(folder / n, model, tokenizer)) for n, model in made.items()}


def _cases(models: dict[str, str], names: tuple[str, ...]) -> list[dict[str, Any]]:
    """Drafters on the first model, the first drafter on the others."""
    ways: list[dict[str, Any]] = [
        {"drafter": "ngram", "budget": 8},
        {"drafter": models["near"], "tree": TREE},
        {"drafter": ["ngram", models["near"]], "budget": 10},
    ]
    loads = [{"target": models["llama"], **way} for way in ways]
    loads += [{"target": models[name], **ways[0]} for name in names]
    # The drafters on the same backend as well: what the last parameters give depends on both.
    return [
        {"load": {**load, "backend": "eager"}, "prompts": PROMPTS, "params": PARAMS}
        for load in loads
    ]


@pytest.mark.parametrize(
    "parallel, names",
    [("tensor", ("qwen2", "granite")), ("pipeline", ("qwen2", "gemma2"))],
)
def test_two_processes_give_the_tokens_of_one(
    parallel: str, names: tuple[str, ...], models: dict[str, str], tmp_path: Path
) -> None:
    cases = _cases(models, names)
    spread = [{**c, "load": {**c["load"], "parallel": parallel}} for c in cases]
    launch = kit.Launch(tmp_path / "ranks", kit.answers, [spread], [spread], REDWOOD_DEBUG="1")
    whole = kit.answers(cases)
    found, followed = launch.results()
    assert found[::2] == whole[::2]
    assert followed == []
    assert found[3] > 1.5, "hardly anything of the drafter's trees was accepted"


def test_what_cannot_be_split_is_refused_with_the_reason(
    models: dict[str, str], tmp_path: Path
) -> None:
    gpt2 = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    )
    folders = {
        "gpt2": gpt2,
        "odd": tiny_llama(num_attention_heads=3, num_key_value_heads=3, hidden_size=24),
        "flat": tiny_llama(layers=1),
        "hybrid": hybrid_model("lfm2", vocab_size=300),
    }
    for name, model in folders.items():
        save_model(tmp_path / name, model, tiny_tokenizer())
    save_file({}, tmp_path / "hybrid" / "model.safetensors")  # it has no weights to be loaded
    cases = [
        {"load": {"target": str(tmp_path / name), "parallel": parallel}}
        for name, parallel in (
            ("gpt2", "tensor"),
            ("gpt2", "pipeline"),
            ("odd", "tensor"),
            ("flat", "pipeline"),
            ("hybrid", "tensor"),
        )
    ]
    launch = kit.Launch(tmp_path / "ranks", kit.answers, [cases, True], [cases, True])
    found, other = launch.results()
    assert found == other
    assert [line.split(":")[0] for line in found] == ["UnsupportedError"] * 5
    assert "no tensor parallel plan for gpt2" in found[0]
    assert "gpt2 models into a pipeline" in found[1]
    assert "3 heads with 3 heads of keys" in found[2]
    assert "1 layers do not make 2 stages" in found[3]
    assert "run lfm2 models in one, without parallel" in found[4]


@pytest.mark.parametrize(
    "parallel, name, reason",
    [
        ("pipeline", "gemma3n", "earlier ones (num_kv_shared_layers): gemma3n"),
        ("pipeline", "gemma4-unified", "earlier ones (num_kv_shared_layers)"),
        ("pipeline", "gemma4-embedded-alone", "(hidden_size_per_layer_input)"),
        ("tensor", "gemma3n", "(activation_sparsity_pattern)"),
    ],
)
def test_what_no_process_has_all_of_is_refused(parallel: str, name: str, reason: str) -> None:
    alone = name.endswith("-alone")
    kit_name, changes = name.removesuffix("-alone"), {"num_kv_shared_layers": 0} if alone else {}
    config = gemma_model(kit_name, **changes).config
    with pytest.raises(UnsupportedError, match=re.escape(reason)):
        _refuse(config, parallel, 2)


@pytest.mark.parametrize("parallel", ["tensor", "pipeline"])
@pytest.mark.parametrize("name", ["lfm2", "qwen35", "mamba2", "granite-hybrid"])
def test_recurrent_layers_are_refused_by_the_config_alone(parallel: str, name: str) -> None:
    model = (mamba_model if name in MAMBAS else hybrid_model)(name)
    with pytest.raises(UnsupportedError, match="recurrent layers .* without parallel"):
        _refuse(model.config, parallel, 2)


def test_a_hybrids_family_without_recurrent_layers_is_not_taken_for_one() -> None:
    assert not has_recurrent_layers(mamba_model("granite-hybrid-all-attention").config)


def test_a_stage_that_would_scale_its_input_again_is_refused(
    models: dict[str, str], tmp_path: Path
) -> None:
    given = ["pipeline", models["granite"]]
    launch = kit.Launch(tmp_path / "ranks", kit.endless, given, given)
    assert 0 not in launch.codes()
    assert "does more than its layers at stage 1" in "".join(launch.errors())


@pytest.mark.parametrize("name, reason", [("other", "the weights"), ("qwen2", "config.json")])
def test_ranks_with_different_models_say_so(
    name: str, reason: str, models: dict[str, str], tmp_path: Path
) -> None:
    words = ["generate", "--parallel", "tensor", "--raw", "Tom", "--target"]
    launch = kit.Launch(
        tmp_path / "ranks", kit.command, [*words, models["llama"]], [*words, models[name]]
    )
    assert launch.codes() == [1, 1]
    for said in launch.errors():
        assert said.startswith(f"error: rank 1 has another model than rank 0: {reason} in ")
        assert said.count("\n") == 1
        assert models[name] in said and models["llama"] in said


def test_ranks_with_different_options_say_so(models: dict[str, str], tmp_path: Path) -> None:
    words = ["generate", "--parallel", "pipeline", "--raw", "Tom", "--target", models["llama"]]
    launch = kit.Launch(tmp_path / "ranks", kit.command, words, [*words, "--capacity", "64"])
    assert launch.codes() == [1, 1]
    expected = "error: rank 1 was started with capacity 64, rank 0 with 256\n"
    assert launch.errors() == [expected, expected]


@pytest.mark.parametrize("parallel", ["tensor", "pipeline"])
@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_rank_ends_the_other_with_one_line(
    killed: int,
    parallel: str,
    models: dict[str, str],
    tmp_path: Path,
) -> None:
    given = [parallel, models["llama"]]
    launch = kit.Launch(tmp_path / "ranks", kit.endless, given, given)
    launch.wait_for("answering")
    os.kill(launch.processes[killed].pid or 0, signal.SIGKILL)
    left = launch.processes[1 - killed]
    left.join(kit.PATIENCE_S)
    assert left.exitcode == 1
    expected = f"error: rank {killed} has ended without a word: rank {1 - killed} ends, too\n"
    assert launch.errors()[1 - killed] == expected


def test_ranks_that_drift_apart_are_caught_in_debug_mode(
    models: dict[str, str], tmp_path: Path
) -> None:
    given = ["tensor", models["llama"]]
    launch = kit.Launch(tmp_path / "ranks", kit.endless, given, [*given, True], REDWOOD_DEBUG="1")
    assert 0 not in launch.codes()
    said = launch.errors()
    assert "the ranks are out of step at forward" in said[0]
    assert "rank 1 has another tree than rank 0" in said[0]
    assert "rank 1 has another tree than rank 0: rank 1 ends, too" in said[1]


def test_ctrl_c_at_rank_0_ends_all(models: dict[str, str], tmp_path: Path) -> None:
    words = ["generate", "--parallel", "pipeline", "--target", models["llama"], "--raw", "Tom"]
    words += ["--max-tokens", "240", "--ignore-eos", "--temperature", "1", "--drafter", "none"]
    launch = kit.Launch(tmp_path / "ranks", kit.command, words, words, REDWOOD_DEBUG="1")
    launch.wait_for("0.out")
    os.kill(launch.processes[0].pid or 0, signal.SIGINT)
    assert launch.codes() == [130, 0], launch.errors()
    assert launch.errors() == ["interrupted\n", ""]


def test_the_command_line_answers_at_rank_0_alone(models: dict[str, str], tmp_path: Path) -> None:
    words = ["generate", "--parallel", "tensor", "--target", models["llama"], "--raw", "Tom"]
    words += ["--max-tokens", "8", "--temperature", "0.8", "--seed", "2"]
    launch = kit.Launch(tmp_path / "ranks", kit.command, words, words)
    assert launch.codes() == [0, 0], launch.errors()
    whole = kit.redwood.load(models["llama"], "ngram", backend="eager", budget=4)
    answer = whole.generate("Tom", max_tokens=8, temperature=0.8, seed=2)
    assert launch.output() == [answer.text + "\n", ""]
    assert launch.errors()[1] == ""
