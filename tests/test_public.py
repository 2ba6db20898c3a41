"""The public face: names, README, examples."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import redwood
from redwood.cli import main
from redwood.datastore import create
from redwood.models.tokenizer import load_tokenizer

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def test_all_names_exist_and_are_documented() -> None:
    for name in redwood.__all__:
        assert getattr(redwood, name).__doc__, name


def test_import_is_light() -> None:
    code = "import sys, redwood; assert 'torch' not in sys.modules, 'torch'"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda e: e.stem)
def test_every_example_runs(
    example: Path, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [str(example), str(tiny_model_folder)])
    runpy.run_path(str(example), run_name="__main__")


def test_the_python_of_the_readme_runs(tiny_model_folder: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    exec(blocks[0].replace("smollm2-135m-instruct", str(tiny_model_folder)), {})
    assert "custom_generate=redwood.hf.generate" in blocks[1]


def _commands() -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    ours = [line for line in lines if line.startswith(".venv/bin/redwood")]
    # Servers do not end by themselves: tests/cli/test_cli_serve.py and test_replicas.py run them.
    return [line for line in ours if " serve " not in line and " deploy --run" not in line]


@pytest.mark.parametrize("command", _commands())
def test_the_commands_of_the_readme_run(
    command: str,
    tiny_model_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    import io
    import shlex

    monkeypatch.chdir(tmp_path)
    words = shlex.split(command, comments=True)[1:]
    models = r"smollm2-135m-instruct|qwen2\.5-coder-[.\d]+b-instruct"
    words = [re.sub(models, str(tiny_model_folder), word) for word in words]
    if "--target" not in words and words[0] in ("generate", "chat", "index"):
        words += ["--target", str(tiny_model_folder)]
    # What the commands read, small enough for the context of a tiny model.
    (tmp_path / "docs").mkdir()
    for name in ("README.md", "docs/notes.md"):
        (tmp_path / name).write_text("Tom went to the sea.\n")
    if any("index:" in word for word in words):
        create(tmp_path / "notes.index", load_tokenizer(tiny_model_folder), [[5, 6, 7]])
    if words[:2] == ["bench", "prompts"]:
        words[words.index("--max-tokens") + 1] = "4"
        words[words.index("--prompts") + 1] = str(ROOT / "tests" / "data" / "short.jsonl")
    monkeypatch.setattr(sys, "argv", ["redwood", *words])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"Tom\n")))
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code, capfd.readouterr().err


def test_readme_is_short_and_names_no_machine() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 150
