"""`redwood index`: from files to a datastore, and what it says when something is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cli_kit import Ran
from conftest import tiny_tokenizer
from datastore_kit import Words, documents_in, store_of
from redwood.datastore import Datastore
from redwood.datastore.sources import Documents, find_files
from redwood.errors import ArgumentError

CHAT = [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Hello!"}]


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    (folder / "deep" / ".hidden").mkdir(parents=True)
    (folder / "b.txt").write_text("Tom went to the market.")
    (folder / "deep" / "a.py").write_text("def add(a, b):\n    return a + b\n")
    (folder / "deep" / ".hidden" / "x.txt").write_text("hidden")
    (folder / ".secret").write_text("hidden")
    (folder / "picture.png").write_bytes(b"\x89PNG\xff\xfe")
    (folder / "empty.txt").write_text("")
    (folder / "link.txt").symlink_to(folder / "b.txt")
    return folder


def _texts_in(path: Path) -> list[str]:
    tokenizer = tiny_tokenizer()
    return [tokenizer.decode(ids) for ids in documents_in(Datastore.open(path))]


def test_a_datastore_is_made_shown_extended_checked_and_removed(
    texts: Path, tmp_path: Path, tiny_model_folder: Path
) -> None:
    path, model = str(tmp_path / "s"), str(tiny_model_folder)
    made = Ran("index", "create", path, str(texts), "--target", model, "--json")
    assert made.json["added_documents"] == made.json["documents"] == 2
    assert "left out 1 files that are no UTF-8 text" in made.stderr
    assert _texts_in(Path(path)) == [
        "Tom went to the market.",
        "def add(a, b):\n    return a + b\n",
    ]
    chats = tmp_path / "chats.jsonl"
    lines: list[Any] = [{"messages": CHAT}, {"prompt": "Hello?", "response": "Hello!"}]
    lines += [{"text": "Anna bought pears."}, "Größe", {"token_ids": [5, 6]}]
    chats.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    added = Ran("index", "add", path, str(chats), "--json")  # whose tokenizer is known
    assert (added.json["added_documents"], added.json["documents"]) == (5, 7)
    chat = "<s>user: Hello?</s><s>assistant: Hello!</s>"
    assert _texts_in(Path(path))[2:6] == [chat, chat, "Anna bought pears.", "Größe"]
    assert documents_in(Datastore.open(path))[6] == [5, 6]
    shown = Ran("index", "info", path, "--json").json
    assert shown["tokens"] == added.json["tokens"] and len(shown["chunks"]) == 1
    assert shown["tokenizer"] == str(tiny_model_folder.resolve())
    assert "documents" in Ran("index", "info", path).stdout
    assert Ran("index", "verify", path, "--json").json == {"path": path, "intact": True}
    freed = Ran("index", "remove", path, "--json").json["freed_bytes"]
    assert freed > 0 and not Path(path).exists()


def test_an_empty_datastore_may_be_made_and_filled_later(
    texts: Path, tmp_path: Path, tiny_model_folder: Path
) -> None:
    path, model = str(tmp_path / "s"), str(tiny_model_folder)
    made = Ran("index", "create", path, "-t", model, "--chunk-tokens", "64")
    assert "0 documents" in made.stdout and made.code == 0
    for _ in range(12):
        ran = Ran("index", "add", path, str(texts / "b.txt"), "--most-tokens", "100", "--json")
        assert ran.json["added_documents"] == 1
    assert ran.json["tokens"] < 100 and ran.json["chunk_tokens"] == 64
    error = Ran("index", "add", path, str(texts), "--most-tokens", "10").error()
    assert "most_tokens 10 must be at least chunk_tokens, 64" in error


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: "),
        ("5", "line 2: a line must be a string, or an object with text"),
        ('{"prompt": "Hi"}', "line 2: a line must be"),
        ('{"messages": [{"role": "user"}]}', "line 2: messages must have a role and a content"),
        ('{"messages": "Hi"}', "line 2: messages must have"),
        ('{"prompt": "Hi", "response": 5}', "line 2: messages must have"),
        ('{"text": "\\ud800"}', "line 2: 'utf-8' codec can't encode"),
        ('{"token_ids": [-5]}', "token -5 of a document"),
        ("\udcff", "is not UTF-8 text"),
    ],
)
def test_a_bad_line_is_named_and_nothing_is_made(
    tmp_path: Path, tiny_model_folder: Path, line: str, message: str
) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_bytes(b'"fine"\n' + line.encode("utf-8", "surrogateescape") + b"\n")
    ran = Ran("index", "create", str(tmp_path / "s"), str(file), "-t", str(tiny_model_folder))
    assert message in ran.error()
    assert not (tmp_path / "s").exists()


def test_wrong_names_are_errors_of_one_line(
    tmp_path: Path, tiny_model_folder: Path, texts: Path
) -> None:
    path, model = str(tmp_path / "s"), str(tiny_model_folder)
    absent = str(tmp_path / "absent")
    for words in (["info"], ["verify"], ["remove"], ["add", absent, str(texts)][:1]):
        more = [str(texts)] if words == ["add"] else []
        assert "is no datastore" in Ran("index", *words, absent, *more).error()
    assert "does not exist" in Ran("index", "create", path, absent, "-t", model).error()
    picture = str(texts / "picture.png")
    assert "not UTF-8" in Ran("index", "create", path, picture, "-t", model).error()
    Ran("index", "create", path, "-t", model)
    assert "a datastore already" in Ran("index", "create", path, "-t", model).error()
    assert (
        "chunk_tokens 3 must be"
        in Ran("index", "create", absent, "-t", model, "--chunk-tokens", "3").error()
    )


def test_text_for_another_model_is_refused(
    tmp_path: Path, tiny_model_folder: Path, texts: Path
) -> None:
    store_of(tmp_path / "s", [[1, 2]])
    ran = Ran("index", "add", str(tmp_path / "s"), str(texts), "-t", str(tiny_model_folder))
    assert "made with another tokenizer, that of test" in ran.error()


def test_a_datastore_drafts_on_the_command_line(
    tmp_path: Path, tiny_model_folder: Path, texts: Path
) -> None:
    path, model = str(tmp_path / "s"), str(tiny_model_folder)
    Ran("index", "create", path, str(texts), "-t", model)
    for drafter in (f"index:{path}", f"ngram+index:{path}"):
        words = ["Tom went", "-t", model, "-d", drafter, "--max-tokens", "4", "--temperature", "0"]
        assert Ran("generate", *words, "--budget", "6", "--json").json["stats"]["num_drafts"] >= 1
    prompts = tmp_path / "p.jsonl"
    prompts.write_text('{"prompt": "Tom went to the market."}')
    words = ["--prompts", str(prompts), "-t", model, "-d", drafter, "--max-tokens", "4", "--json"]
    assert drafter in Ran("bench", "prompts", *words).stdout
    absent = Ran("generate", "Hi", "-t", model, "-d", "index:absent")
    assert "absent is no datastore" in absent.error()


def test_help_has_examples() -> None:
    for words in (["create"], ["add"], ["info"], ["verify"], ["remove"]):
        assert "$ redwood index" in Ran("index", *words, "--help").stdout


def test_long_files_are_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from redwood.datastore import sources

    monkeypatch.setattr(sources, "_BLOCK", 10)
    file = tmp_path / "long.txt"
    file.write_text("a b\n" * 9)
    read = list[int]()
    documents = Documents(find_files([file]), Words("a", "b"), read.append)
    assert [token for document in documents for token in document] == [0, 1] * 9
    assert len(list(documents)) > 1 and read == [36, 36]


def test_lines_of_another_kind_are_text_in_a_folder_and_errors_by_name(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    file = tmp_path / "d" / "log.jsonl"
    file.write_text("a b\nb a\n")
    words = Words("a", "b")
    assert list(Documents(find_files([tmp_path / "d"]), words)) == [[0, 1, 1, 0]]
    with pytest.raises(ArgumentError, match="line 1"):
        list(Documents(find_files([file]), words))


def test_chats_need_a_chat_template(tmp_path: Path) -> None:
    file = tmp_path / "c.jsonl"
    file.write_text(json.dumps({"messages": CHAT}))
    with pytest.raises(ArgumentError, match="no chat template: give lines with text"):
        list(Documents(find_files([file]), Words("a")))
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    with pytest.raises(ArgumentError, match="refuses these messages"):
        list(Documents(find_files([file]), tokenizer))
