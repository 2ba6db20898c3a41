"""A folder of tuned drafters, and `redwood tune`: whole runs, resumed ones, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_tuning import fresh, peaked
from transformers import AutoModelForCausalLM

import redwood
from cli_kit import Ran
from conftest import save_model, tiny_tokenizer
from redwood._storage import write_whole
from redwood.errors import ArgumentError, ModelError
from redwood.tuning import Project, TuningPlan, shallow_copy
from redwood.tuning import project as project_module
from redwood.tuning.project import split

WORDS = ["Tom", "went", "to", "the", "market", "Anna", "bought", "pears", "def", "add", "return"]


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `target`, `start` and `other` (other tokens), and prompts.jsonl."""
    folder = tmp_path_factory.mktemp("tune")
    save_model(folder / "target", peaked(), tiny_tokenizer())
    save_model(folder / "start", fresh(), tiny_tokenizer())
    save_model(folder / "other", fresh(), tiny_tokenizer())
    file = folder / "other" / "tokenizer.json"
    changed = json.loads(file.read_text())
    vocabulary = changed["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    file.write_text(json.dumps(changed))
    chosen = np.random.default_rng(0).choice(WORDS, (40, 4)).tolist()
    lines = [json.dumps({"prompt": " ".join(words)}) + "\n" for words in chosen]
    (folder / "prompts.jsonl").write_text("".join(lines))
    return folder


def options(places: Path, out: Path, *more: str, begin: Sequence[str] = ()) -> list[str]:
    given = ["tune", "-t", str(places / "target"), "--prompts", str(places / "prompts.jsonl")]
    begin = begin or ["--from", str(places / "start")]
    how = ["--max-tokens", "16", "--epochs", "6", "--learning-rate", "0.02", "--raw"]
    return [*given, "--out", str(out), *begin, *how, "--batch-tokens", "128", *more]


@pytest.fixture(scope="module")
def made(places: Path) -> Path:
    """A finished run of two models."""
    out = places / "tuned"
    ran = Ran(*options(places, out, "--models", "2", "--held-out", "0.1"))
    assert ran.code == 0, ran.stderr
    return out


def test_two_models_are_tuned_measured_and_shown(places: Path, made: Path) -> None:
    ran = Ran(*options(places, made, "--models", "2", "--held-out", "0.1", "--json"))
    report = ran.json  # the second run makes nothing
    before, first = report["before"][0], report["models"][0]
    assert first["rates"][0] > before["rates"][0] + 0.2
    assert report["prompts"] == {"training": 32, "validation": 4, "held_out": 4}
    assert [model["folder"] for model in report["models"]] == ["1", "2"]
    left = [(model["left"], model["of"]) for model in report["models"]]
    assert left[0][0] == left[0][1] == left[1][1] > left[1][0]
    for row in [before, *report["models"], report["union"]]:
        assert row["decoding"]["identical"] == row["decoding"]["of"] == 4
        assert row["decoding"]["budget"] == 9
    assert (
        first["decoding"]["mean_acceptance_length"] > before["decoding"]["mean_acceptance_length"]
    )
    shown = Ran(*options(places, made, "--models", "2", "--held-out", "0.1"))
    assert shown.code == 0 and shown.stderr == ""
    for said in ("before: start", "1, tuned", "in one tree", "were left to learn", "1+", "+ngram"):
        assert said in shown.stdout, said


def test_tuned_models_change_no_text(places: Path, made: Path) -> None:
    target = str(places / "target")
    plain = redwood.load(target)
    joined = redwood.load(target, f"{made / '1'}+{made / '2'}+ngram", budget=8)
    prompts = ["Tom went to", "Anna bought", "def add"]
    for how in ({"temperature": 0.0}, {"temperature": 0.9, "seed": 4}):
        ours, theirs = (
            [each.token_ids for each in engine.generate(prompts, max_tokens=20, **how)]
            for engine in (joined, plain)
        )
        assert ours == theirs, how


def files(folder: Path) -> dict[str, bytes]:
    """What a run makes; the report names folders, and is left out."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*.safetensors"))
    }


@pytest.mark.parametrize("place", ["Model 1: Epoch 2", "Model 2: Epoch 2"])
def test_an_interrupted_run_goes_on_and_ends_alike(
    places: Path, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    args = options(places, tmp_path / "out", "--models", "2", "--held-out", "0.1")
    run = Project.run

    def cut(self: Project, *given: Any, **more: Any) -> Any:
        def interrupt(what: str, done: int, of: int) -> None:
            if what.startswith(place):
                raise KeyboardInterrupt

        return run(self, *given, **{**more, "on_progress": interrupt})

    monkeypatch.setattr(Project, "run", cut)
    assert Ran(*args).code == 130
    monkeypatch.setattr(Project, "run", run)
    ran = Ran(*args, "--json")
    assert ran.json["models"][0]["rates"]
    assert files(tmp_path / "out") == files(made)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"1", "2", "corpus", "plan.json", "tune.json", ".lock"}


def test_another_plan_and_other_things_are_refused(
    places: Path, made: Path, tmp_path: Path
) -> None:
    again = ("--models", "2", "--held-out", "0.1")
    other = Ran(*options(places, made, *again, "--seed", "1")).error()
    assert "was made with seed 0, not 1" in other
    (tmp_path / "file").write_text("")
    assert "holds other things" in Ran(*options(places, tmp_path)).error()


def test_damaged_files_are_one_line(places: Path, made: Path, tmp_path: Path) -> None:
    args = options(places, tmp_path / "copy", "--models", "2", "--held-out", "0.1")

    def damage(name: str, *, drop: str = "tune.json") -> str:
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)
        shutil.copytree(made, tmp_path / "copy")
        (tmp_path / "copy" / drop).unlink(missing_ok=True)
        path = tmp_path / "copy" / name
        path.write_bytes(path.read_bytes()[:-9])
        return Ran(*args).error()

    assert "tune.json is damaged" in damage("tune.json", drop="nothing")
    assert "plan.json is damaged" in damage("plan.json")
    assert "000000.safetensors is damaged" in damage("corpus/000000.safetensors")
    assert "redwood-tuning.json is missing or damaged" in damage("1/redwood-tuning.json")
    assert "1 does not load" in damage("1/model.safetensors")


@pytest.mark.parametrize(
    ("more", "code", "said"),
    [
        (["--layers", "1"], 2, "either --from MODEL or --layers N"),
        (["--models", "0"], 2, "--models"),
        (["--from", "START", "--models", "3"], 1, "2 models to begin with, for 3"),
        (["--learning-rate", "-1"], 1, "learning_rate -1.0 must be above 0"),
        (["--epochs", "0"], 1, "epochs 0"),
        (["--held-out", "0.5"], 1, "held_out 0.5"),
        (["--distill", "21"], 1, "distill 21"),
        (["--temperature", "-1"], 1, "temperature"),
        (["--max-tokens", "0"], 1, "max_tokens"),
        (["--marked-weight", "0.5"], 1, "marked_weight is for the second model"),
        (["--backend", "fast"], 1, "backend 'fast'"),
        (["--prompts", "no-file"], 1, "no-file"),
        (["--capacity", "4"], 1, "line 1: the prompt has"),
        (["--out", "a+b"], 2, "joins drafters"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_wrong_options_are_one_line(
    places: Path, tmp_path: Path, more: list[str], code: int, said: str
) -> None:
    given = [str(places / "start") if each == "START" else each for each in more]
    assert said in Ran(*options(places, tmp_path / "out", *given)).error(code)


def test_few_prompts_other_tokens_and_a_full_disk_are_refused(
    places: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = tmp_path / "few.jsonl"
    few.write_text('{"prompt": "a"}\n{"prompt": "b"}\n{"prompt": "c"}\n{"prompt": "c"}\n')
    ran = Ran(*options(places, tmp_path / "out", "--prompts", str(few)))
    assert "1 prompts stand there twice" in ran.stderr and "3 prompts are too few" in ran.stderr
    other = options(places, tmp_path / "out", begin=["--from", str(places / "other")])
    assert "different tokenizers" in Ran(*other).error()
    monkeypatch.setattr(
        project_module.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 0)
    )
    full = Ran(*options(places, tmp_path / "new")).error()
    assert "has 0 bytes free, tuning may take" in full


def test_a_folder_in_use_is_refused(places: Path, tmp_path: Path) -> None:
    plan = TuningPlan("t", ("s",), None, 1, "p")
    first, second = Project(tmp_path / "out", plan), Project(tmp_path / "out", plan)
    with first._alone(), pytest.raises(ArgumentError, match="another process is at work"):
        with second._alone():
            pass


def test_every_prompt_serves_for_one_thing() -> None:
    parts = split(30, 0.1, 0)
    assert [len(part) for part in parts] == [24, 3, 3]
    assert sorted(number for part in parts for number in part) == list(range(30))
    assert parts == split(30, 0.1, 0) != split(30, 0.1, 1)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    write_whole(path, b"old")

    def full(self: Path, other: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="No space"):
        write_whole(path, b"new")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


# --- the target's own first layers -----------------------------------------------------------


def test_a_shallow_copy_has_the_first_layers(tiny_model_folder: Path) -> None:
    ours = shallow_copy(tiny_model_folder, 1)
    whole: Any = AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float32)
    whole.model.layers = whole.model.layers[:1]
    tokens = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        assert torch.equal(ours(tokens).logits, whole(tokens).logits)
    assert ours.config.num_hidden_layers == 1
    for layers, said in ((2, "fewer than the target's 2"), (0, "at least 1")):
        with pytest.raises(ArgumentError, match=said):
            shallow_copy(tiny_model_folder, layers)


def test_a_folder_that_is_no_model_is_refused(tmp_path: Path, tiny_model_folder: Path) -> None:
    for file in tiny_model_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match="does not load with 1 layers"):
        shallow_copy(tmp_path, 1)


def test_layers_of_the_target_are_tuned(places: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    begin = ["--layers", "1", "--distill", "4", "--temperature", "0.8"]
    report = Ran(*options(places, out, "--json", begin=begin)).json
    assert report["before"][0]["folder"] == str(out / "start")
    assert len(report["models"]) == 1 and (out / "1" / "model.safetensors").is_file()
    assert redwood.load(str(places / "target"), out / "start").generate("Tom", max_tokens=4).text
