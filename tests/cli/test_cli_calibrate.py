"""`redwood calibrate`, in process on tiny random models. What takes long is made short."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

import redwood.bench.calibrate as calibration
from cli_kit import Ran
from conftest import save_model, tiny_llama, tiny_tokenizer
from redwood.cli.bench import read_tasks
from redwood.cli.calibrate import BUILT_IN
from redwood.profiling.profile import Profile


@pytest.fixture(autouse=True)
def measured(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Short measurements; the drafters of each are noted."""
    noted: list[list[str]] = []
    calibrate = calibration.calibrate

    def short(*args: Any, **options: Any) -> Profile:
        noted.append(list(args[1]))
        return calibrate(*args, **{**options, "seconds": 0.2})

    monkeypatch.setattr(calibration, "calibrate", short)
    return noted


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    path = tmp_path / "prompts.jsonl"
    lines = [{"prompt": "Tom went. Tom went."}, {"turns": ["Anna bought pears"]}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


@pytest.fixture
def common(tiny_model_folder: Path, prompts: str) -> list[str]:
    target = str(tiny_model_folder)
    return ["calibrate", "-t", target, "--prompts", prompts, "--max-tokens", "6"]


def test_a_profile_is_made_once_and_then_shown(
    common: list[str], tiny_draft_folder: Path, measured: list[list[str]]
) -> None:
    args = [*common, "--drafter", f"ngram,{tiny_draft_folder}"]
    ran = Ran(*args)
    assert ran.code == 0, ran.stderr
    assert measured == [["ngram", str(tiny_draft_folder)]]
    for said in ("milliseconds of one forward", "2 rows x 4", "±", "decoded", "x plain", "kept in"):
        assert said in ran.stdout, said
    again = Ran(*args)
    assert (again.code, again.stdout, again.stderr) == (0, ran.stdout, "")
    shown = Ran(*args, "--json").json
    assert len(measured) == 1
    profile = Profile.load(Path(shown["path"]))
    assert profile.made in ran.stdout
    assert shown["profile"]["step_ms"] == profile.step_ms
    assert [(c["drafter"], c["temperature"]) for c in shown["choices"]] == [
        (name, at) for name in profile.drafters for at in ("0", "0.6")
    ]
    Ran(*args, "--force")
    assert len(measured) == 2


def test_what_is_missing_is_measured_and_the_rest_kept(
    common: list[str], tiny_draft_folder: Path, measured: list[list[str]]
) -> None:
    first = Ran(*common, "--drafter", "ngram", "--json").json
    more = Ran(*common, "--drafter", str(tiny_draft_folder), "--json")
    assert "was not measured; measuring again" in more.stderr and more.stderr.count("\n") == 1
    assert more.json["path"] == first["path"]
    both = more.json["profile"]["drafters"]
    assert both["ngram"] == first["profile"]["drafters"]["ngram"] and len(both) == 2
    assert Ran(*common, "--drafter", f"ngram,{tiny_draft_folder}").stderr == ""
    assert len(measured) == 2
    warmer = Ran(*common, "--drafter", "ngram", "--temperatures", "0,1")
    assert "ngram was not measured at temperature 1" in warmer.stderr


@pytest.mark.parametrize("text", ["", "{}", '{"sha256": "", "value": {}}'])
def test_a_damaged_profile_is_made_again_and_one_line_says_so(common: list[str], text: str) -> None:
    made = Ran(*common, "--json").json
    Path(made["path"]).write_text(text)
    ran = Ran(*common, "--json")
    assert ran.json["path"] == made["path"]
    assert ran.stderr.count("\n") == 1 and "damaged" in ran.stderr
    assert "measuring again" in ran.stderr
    assert Ran(*common).stderr == ""


def test_a_profile_of_a_changed_model_is_not_used(
    common: list[str], tiny_model_folder: Path, tmp_path: Path, measured: list[list[str]]
) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in tiny_model_folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    args = [arg if arg != str(tiny_model_folder) else str(copy) for arg in common]
    Ran(*args)
    (copy / "config.json").write_text((copy / "config.json").read_text() + "\n")
    Ran(*args)
    assert len(measured) == 2


def test_the_target_can_be_measured_alone(common: list[str]) -> None:
    made = Ran(*common, "--drafter", "none", "--json").json
    assert made["profile"]["drafters"] == {} and made["choices"] == []
    assert Ran(*common, "--drafter", "none").code == 0


@pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None, reason="Matplotlib is not installed"
)
def test_the_plot_is_drawn_for_old_and_new_profiles(common: list[str], tmp_path: Path) -> None:
    for name in ("new.png", "old.svg"):
        ran = Ran(*common, "--plot", str(tmp_path / name))
        assert ran.code == 0 and (tmp_path / name).stat().st_size > 5000
    assert "cannot write" in Ran(*common, "--plot", str(tmp_path / "no" / "a.png")).error()


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        (["--temperatures", "-1"], 2, "from 0 to 10"),
        (["--temperatures", "nan"], 2, "from 0 to 10"),
        (["--temperatures", "a"], 2, "not a list of numbers"),
        (["--max-tokens", "1"], 2, "max-tokens"),
        (["--plot", "figure.txt"], 1, ".png, .svg, .pdf"),
        (["--drafter", "ngram,,none"], 2, "an empty name"),
        (["--prompts", "no-file"], 1, "no-file"),
        (["--backend", "fast"], 1, "backend 'fast'"),
        (["--capacity", "20"], 1, "line 1: the prompt has"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_wrong_options_are_one_line(
    common: list[str], args: list[str], code: int, said: str
) -> None:
    assert said in Ran(*common, *args).error(code)


def test_built_in_prompts_are_of_several_kinds(tiny_model_folder: Path) -> None:
    tasks = read_tasks(BUILT_IN)
    assert len(tasks) == len({task.prompt for task in tasks}) == 16
    kinds = {"chat", "edit", "summary", "extract", "code", "translate", "maths"}
    assert {task.category for task in tasks} == kinds
    assert max(len(task.prompt) for task in tasks) < 1000
    small = ["calibrate", "-t", str(tiny_model_folder), "--capacity", "18", "--drafter", "none"]
    assert "holds none of the prompts" in Ran(*small).error()


def test_a_model_whose_chat_template_fails_is_measured_with_plain_text(
    tmp_path: Path, prompts: str
) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = {"rag": "R", "tool_use": "T"}
    folder = save_model(tmp_path / "target", tiny_llama(), tokenizer)
    ran = Ran("calibrate", "-t", str(folder), "--prompts", prompts, "--max-tokens", "6")
    assert ran.code == 0, ran.stderr
    assert "none called default" in ran.stderr and "measuring with plain text" in ran.stderr
