"""`--checkpoint-tokens`: it reaches a target with recurrent layers, and is refused elsewhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from cli_kit import Ran, only_made
from conftest import save_model, tiny_tokenizer
from hybrids_kit import hybrid_model
from redwood.cli.loading import open_engine
from redwood.cli.serve_models import Several, plans_of
from redwood.errors import ArgumentError

pytest.importorskip("redwood._native", reason="installed without a compiler")


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("hybrid")
    return str(save_model(folder, hybrid_model("lfm2", vocab_size=300), tiny_tokenizer()))


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What `redwood serve` would run."""
    return only_made(monkeypatch)


def test_the_target_gets_it_and_drafters_do_not(hybrid: str, tiny_draft_folder: Path) -> None:
    for drafter in ("none", str(tiny_draft_folder)):
        engine = open_engine(hybrid, drafter, checkpoint_tokens=24, quiet=True)
        assert getattr(engine.target, "checkpoint_tokens", None) == 24
    engine = open_engine(hybrid, "none", checkpoint_tokens=None, quiet=True)
    assert getattr(engine.target, "checkpoint_tokens", None) == 512


def test_an_answer_is_the_same_with_any_distance(hybrid: str) -> None:
    args = ["generate", "--raw", "-t", hybrid, "--drafter", "ngram", "--max-tokens", "5"]
    args += ["--temperature", "0", "--json", "ab" * 40]
    answers = [
        Ran(*args, "--checkpoint-tokens", each).json["token_ids"] for each in ("0", "7", "512")
    ]
    assert answers[0] == answers[1] == answers[2]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--backend", "eager"], "checkpoint_tokens: only the native backend has"),
        (["--dtype", "float32"], "checkpoint_tokens: only the native backend has"),
        (["--offload", "disk"], "checkpoint_tokens cannot go with offload"),
    ],
)
def test_other_backends_refuse_it(hybrid: str, more: list[str], said: str) -> None:
    for command in (["generate", "x"], ["chat"]):
        ran = Ran(*command, "-t", hybrid, "--checkpoint-tokens", "64", *more)
        assert said in ran.error()


def test_models_without_recurrent_layers_refuse_it(tiny_model_folder: Path) -> None:
    asked = ["-t", str(tiny_model_folder), "--checkpoint-tokens", "64"]
    for command in (["generate", "x"], ["chat"], ["serve", "--port", "0"]):
        assert "llama models have no recurrent layers" in Ran(*command, *asked).error()


def test_a_wrong_number_names_the_option() -> None:
    for command in (["generate", "x"], ["chat"], ["serve"], ["deploy"]):
        for wrong in ("-1", "many"):
            error = Ran(*command, "--checkpoint-tokens", wrong).error(code=2)
            assert "--checkpoint-tokens" in error


def test_replicas_get_it(hybrid: str) -> None:
    ran = Ran("deploy", "-t", hybrid, "--checkpoint-tokens", "0")
    assert ran.code == 0, ran.stderr
    (application,) = yaml.safe_load(ran.stdout)["applications"]
    assert application["args"]["engine"] == {"checkpoint_tokens": 0}


def test_a_model_of_a_list_has_its_own(
    hybrid: str, tiny_model_folder: Path, tmp_path: Path, served: list[Any]
) -> None:
    listed = tmp_path / "models.json"
    models: list[dict[str, Any]] = [
        {"name": "a", "target": hybrid, "checkpoint_tokens": 24, "drafter": "none"},
        {"name": "b", "target": str(tiny_model_folder), "drafter": "none"},
    ]
    listed.write_text(json.dumps(models))
    ran = Ran("serve", "--models", str(listed), "--port", "0")
    assert ran.code == 0 and "warning" not in ran.stderr, ran.stderr
    assert served[-1].models[0].service.engine.target.checkpoint_tokens == 24
    ran = Ran("serve", "--models", str(listed), "--port", "0", "--checkpoint-tokens", "48")
    assert ran.code == 0, ran.stderr
    assert "requests for b will fail: checkpoint_tokens: llama models" in ran.stderr
    assert served[-1].models[0].service.engine.target.checkpoint_tokens == 24
    models[0]["checkpoint_tokens"] = -1
    listed.write_text(json.dumps(models))
    with pytest.raises(ArgumentError, match="checkpoint_tokens -1 must not be negative"):
        plans_of(None, Several(models=listed), {})
