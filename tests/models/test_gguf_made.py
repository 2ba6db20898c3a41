"""From a GGUF file to the tokenizer in use: what the cache keeps, refuses, and makes again."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import redwood
from cli_kit import Ran
from decoder_kit import gguf_settings, gguf_tensors, tiny_model, write_gguf
from gguf_tokens_kit import TEXTS, built, byte_level, ids
from models_kit import FakeWorld, resolve
from redwood import models
from redwood.errors import ArgumentError, ModelError
from redwood.models import _cache, _convert
from redwood.models.tokenizer import load_tokenizer

pytestmark = pytest.mark.usefixtures("forked_conversions")
SIZE = len(byte_level()["tokenizer.ggml.tokens"])


@pytest.fixture(scope="module", autouse=True)
def one_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Conversions take seconds: one cache for what these tests convert."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REDWOOD_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def file_with(path: Path, architecture: str = "llama", **tokens: Any) -> Path:
    metadata = byte_level(**tokens)
    model = tiny_model(architecture, vocab_size=len(metadata["tokenizer.ggml.tokens"]))
    return write_gguf(path, architecture, gguf_settings(model), gguf_tensors(model), metadata)


@pytest.fixture(scope="module")
def unknown(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return file_with(tmp_path_factory.mktemp("unknown") / "new.gguf", pre="of-next-year")


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("own")
    built(byte_level("qwen2")).save_pretrained(folder)
    return folder


def test_what_is_loaded_is_the_tokenizer_of_the_file(tmp_path: Path) -> None:
    plain = byte_level()
    far = ["<｜User｜>", "<｜end▁of▁sentence｜>"]
    tokens = {
        "tokens": plain["tokenizer.ggml.tokens"] + far,
        "token_type": plain["tokenizer.ggml.token_type"] + [3, 3],
        "eos_token_id": SIZE + 1,
        "pre": "deepseek-r1-qwen",
        "tokenizer.chat_template": "{{ messages[0].content }}",
        "tokenizer.chat_template.tool_use": "{{ 1 }}",
    }
    engine = redwood.load(file_with(tmp_path / "far.gguf", "qwen2", **tokens), threads=1)
    expected = built(byte_level(**tokens))
    assert engine.tokenizer.backend_tokenizer.to_str() == expected.backend_tokenizer.to_str()
    assert engine.tokenizer.chat_template == expected.chat_template
    assert engine.eos_ids == {SIZE + 1, 0, 2} and len(engine.tokenizer) == SIZE + 2
    assert engine.generate("hi", max_tokens=3, logit_bias={SIZE + 1: 1e6}).finish_reason == "stop"
    for text in TEXTS:
        assert engine.encode(text + far[0]) == ids(expected, text + far[0])


def test_an_end_of_text_put_behind_every_text_is_left_off_a_prompt(tmp_path: Path) -> None:
    tokens = {"pre": "smollm", "add_eos_token": True, "bos_token_id": 1, "add_bos_token": True}
    engine = redwood.load(file_with(tmp_path / "ends.gguf", **tokens), threads=1)
    assert ids(engine.tokenizer, "hi")[-1] == 0
    assert engine.encode("hi")[-1] != 0 and engine.encode("") == [1]
    assert engine.encode("hi<|endoftext|>")[-2:] == [0, 0]  # one of them is the user's own


def test_an_unknown_rule_is_refused_and_a_folder_is_the_way_out(unknown: Path, own: Path) -> None:
    with pytest.raises(ModelError, match="pre 'of-next-year' is not known; .*--tokenizer FOLDER"):
        redwood.load(unknown, threads=1)
    engine = redwood.load(unknown, threads=1, tokenizer=own)
    expected = built(byte_level("qwen2"))
    for text in TEXTS:
        assert engine.encode(text) == ids(expected, text)
    assert 0 in engine.eos_ids
    assert engine.generate("hi", max_tokens=2, ignore_eos=True).finish_reason == "length"


def test_a_drafter_whose_tokenizer_is_refused_drafts_all_the_same(unknown: Path, own: Path) -> None:
    engine = redwood.load(unknown, unknown, threads=1, tokenizer=own)
    output = engine.generate("hi", max_tokens=8, ignore_eos=True)
    alone = redwood.load(unknown, threads=1, tokenizer=own)
    assert output.token_ids == alone.generate("hi", max_tokens=8, ignore_eos=True).token_ids


def test_the_command_line_takes_a_tokenizer(unknown: Path, own: Path) -> None:
    options = ["-t", str(unknown), "--drafter", "none", "--threads", "1", "--max-tokens", "2"]
    assert "of-next-year" in Ran("generate", "hi", *options).error()
    ran = Ran("generate", "hi", *options, "--tokenizer", str(own))
    assert ran.code == 0, ran.stderr


def test_a_datastore_is_made_with_the_tokenizer_given(
    unknown: Path, own: Path, tmp_path: Path
) -> None:
    (tmp_path / "a.txt").write_text("x = 12345\n" * 20)
    command = ["index", "create", str(tmp_path / "kept"), str(tmp_path / "a.txt")]
    assert "of-next-year" in Ran(*command, "-t", str(unknown)).error()
    made = Ran(*command, "-t", str(unknown), "--tokenizer", str(own))
    assert made.code == 0, made.stderr
    engine = redwood.load(unknown, f"index:{tmp_path / 'kept'}", threads=1, tokenizer=own)
    assert engine.generate("x = 123", max_tokens=4, ignore_eos=True).finish_reason == "length"


def test_a_tokenizer_of_another_model_is_refused(unknown: Path, own: Path, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="must be a folder with a tokenizer"):
        redwood.load(unknown, threads=1, tokenizer=tmp_path / "nowhere")
    with pytest.raises(ModelError, match="no usable tokenizer"):
        redwood.load(unknown, threads=1, tokenizer=tmp_path)
    data = json.loads((own / "tokenizer.json").read_text())
    names = {index: token for token, index in data["model"]["vocab"].items()}
    swapped = {
        token: SIZE - 1 - index + 260 if index >= 260 else index for index, token in names.items()
    }
    data["model"]["vocab"] = swapped
    for file in own.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(ModelError, match="is not that of new.gguf: token 260 is"):
        redwood.load(unknown, threads=1, tokenizer=tmp_path)


def test_a_note_about_an_old_file_is_said_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = file_with(tmp_path / "old.gguf", pre=None)
    folder, _ = models.locate(str(path), progress=False)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "old.gguf is of an old kind" in lines[0]
    assert models.locate(str(path), progress=False)[0] == folder
    assert capsys.readouterr().err == ""
    assert ids(load_tokenizer(folder), "x 12345") == ids(built(byte_level("default")), "x 12345")


# --- what another version made --------------------------------------------------------------------


def made_by_another(folder: Path, **changes: str) -> None:
    manifest = json.loads((folder / "redwood.json").read_text())
    manifest["made_by"] |= changes
    (folder / "redwood.json").write_text(json.dumps(manifest))


CHANGES = [{"redwood": "0.0.1"}, {"code": "0" * 16}, {"transformers": "5.0.0"}, {"new": "1"}]


@pytest.mark.parametrize("change", CHANGES, ids=str)
@pytest.mark.parametrize("described", [False, True])
def test_what_another_version_made_is_made_again(
    world: FakeWorld,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: dict[str, str],
    described: bool,
) -> None:
    mine = tmp_path / "mine.gguf"
    mine.write_bytes(b"mine")
    for number, name in enumerate((str(mine), "tiny")):
        find = (
            (lambda name=name: models.fetch(name, progress=False))
            if described
            else (lambda name=name: resolve(name))
        )
        folder = find()
        made_by_another(folder, **change)
        assert find() == folder and len(world.conversions) == 2 * number + 2
        assert "was made by another version of Redwood" in capsys.readouterr().err
        assert find() == folder and len(world.conversions) == 2 * number + 2
    assert len(world.downloads) == 3  # the original is what it was


def test_what_another_version_made_is_not_called_damaged(world: FakeWorld) -> None:
    made_by_another(resolve("tiny"), redwood="0.0.1")
    assert {record.name: record.state for record in models.installed()}["tiny"] == "ready"
    models.verify("tiny")


def test_the_makers_change_with_their_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = _convert.makers()
    assert set(before) == {"redwood", "transformers", "tokenizers", "code"}
    folder = Path(_convert.__file__).parent
    for name in _convert._MAKERS:
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    monkeypatch.setattr(_convert, "__file__", str(tmp_path / "_convert.py"))
    assert _convert.makers() == before
    (tmp_path / "_gguf_pre.py").write_text("RULES = {}")
    assert _convert.makers()["code"] != before["code"]


def test_the_names_that_two_modules_share_are_the_same() -> None:
    from redwood.models import tokenizer

    assert tokenizer._REFUSED == _convert.REFUSED
    assert tokenizer._MADE == _cache.MANIFEST
