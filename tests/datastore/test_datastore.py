"""A datastore holds what was added, whole or not at all, and says what is wrong with it."""

from __future__ import annotations

import json
import os
import random
import sys
from pathlib import Path
from typing import Any

import pytest

from datastore_kit import TOKENIZER, Words, documents_in, files_in, store_of
from redwood._storage import digest
from redwood.datastore import Datastore, add, create, folder, remove, store
from redwood.datastore.chunk import MOST_TOKEN, MOST_VALUES
from redwood.datastore.store import MANIFEST, TokenizerId
from redwood.errors import (
    ArgumentError,
    DatastoreError,
    RedwoodError,
    TokenizerMismatchError,
    UnsupportedError,
)

TEXTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9], [1, 2, 4]]


def test_documents_come_back_in_order_however_they_were_added(tmp_path: Path) -> None:
    rng = random.Random(0)
    documents = [[rng.randrange(50) for _ in range(rng.randint(1, 14))] for _ in range(60)]
    at_once = store_of(tmp_path / "a", documents, chunk_tokens=16)
    create(tmp_path / "b", TOKENIZER, chunk_tokens=16)
    for i in range(0, 60, 7):
        add(tmp_path / "b", documents[i : i + 7])
    in_parts = Datastore.open(tmp_path / "b")
    assert documents_in(at_once) == documents_in(in_parts) == documents
    assert at_once.manifest.num_tokens == sum(map(len, documents))
    assert at_once.manifest.num_documents == 60
    at_once.verify()
    in_parts.verify()


def test_an_addition_makes_the_last_chunk_anew_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "s"
    before = store_of(path, [[i] * 9 for i in range(5)], chunk_tokens=20)
    assert [len(chunk) for chunk in before.chunks] == [20, 20, 10]
    add(path, [[7, 7]])
    after = Datastore.open(path)
    assert after.manifest.chunks[:2] == before.manifest.chunks[:2]
    assert files_in(path) == ["00000001.chunk", "00000002.chunk", "00000004.chunk", MANIFEST]
    assert documents_in(before)[-1] == [4] * 9, "an open datastore stays as it was"


def test_long_documents_are_cut_and_empty_ones_left_out(tmp_path: Path) -> None:
    made = store_of(tmp_path / "s", [[], list(range(40)), []], chunk_tokens=16)
    assert documents_in(made) == [list(range(15)), list(range(15, 30)), list(range(30, 40))]


@pytest.mark.parametrize(
    ("token", "width"), [(32767, 2), (32768, 2), (65534, 2), (65535, 4), (65536, 4), (151_936, 4)]
)
def test_tokens_of_every_size_come_back(tmp_path: Path, token: int, width: int) -> None:
    made = store_of(tmp_path / "s", [[0, token, 1], [token, 5]])
    assert documents_in(made) == [[0, token, 1], [token, 5]]
    assert made.chunks[0].values.dtype.itemsize == width
    assert made.chunks[0].find([token + 1]) != (0, 0)
    made.verify()


@pytest.mark.parametrize(
    "document", [[-1], [MOST_TOKEN + 1], [1.5], ["a"], [[1]], [2**70], 5, [None], [[1], 2]]
)
def test_documents_that_are_no_token_ids_are_refused(tmp_path: Path, document: Any) -> None:
    store_of(tmp_path / "s", TEXTS)
    before = files_in(tmp_path / "s")
    with pytest.raises(ArgumentError, match="document"):
        add(tmp_path / "s", [[1, 2], document])
    assert files_in(tmp_path / "s") == before
    assert documents_in(Datastore.open(tmp_path / "s")) == TEXTS


def test_the_oldest_chunks_make_room(tmp_path: Path) -> None:
    path = tmp_path / "s"
    create(path, TOKENIZER, chunk_tokens=16)
    for i in range(40):
        added = add(path, [[i] * 7], most_tokens=40)
        assert sum(chunk.num_values for chunk in added.manifest.chunks) <= 40
    assert documents_in(Datastore.open(path))[-1] == [39] * 7
    assert len(files_in(path)) <= 4
    with pytest.raises(ArgumentError, match="most_tokens 15 must be at least"):
        add(path, [[1]], most_tokens=15)


def test_an_empty_datastore_is_one(tmp_path: Path) -> None:
    made = create(tmp_path / "deep" / "s", TOKENIZER)
    assert (made.chunks, made.manifest.num_tokens) == ((), 0)
    made.verify()
    assert add(made.path, []).manifest == made.manifest


def test_nothing_is_made_where_something_is(tmp_path: Path) -> None:
    store_of(tmp_path / "s", TEXTS)
    with pytest.raises(ArgumentError, match="is a datastore already"):
        create(tmp_path / "s", TOKENIZER)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("dear")
    with pytest.raises(ArgumentError, match=r"not empty \(it holds 'letter.txt'\)"):
        create(tmp_path / "full", TOKENIZER)
    assert files_in(tmp_path / "full") == ["letter.txt"]
    (tmp_path / "file").write_text("")
    with pytest.raises(DatastoreError, match="cannot write to"):
        create(tmp_path / "file", TOKENIZER)


def test_a_failed_creation_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError):
        create(tmp_path / "s", TOKENIZER, [[1], [-1]])
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("size", [0, 15, MOST_VALUES + 1, True, 1.5])
def test_a_chunk_has_a_size_that_can_be(tmp_path: Path, size: Any) -> None:
    with pytest.raises(ArgumentError, match="chunk_tokens"):
        create(tmp_path / "s", TOKENIZER, chunk_tokens=size)


def test_another_tokenizer_is_refused_by_name(tmp_path: Path) -> None:
    words = Words("a", "b", name="model-a")
    made = create(tmp_path / "s", words, [[0, 1]])
    assert made.manifest.tokenizer == TokenizerId("model-a", 2, TokenizerId.of(words).sha256)
    Datastore.open(tmp_path / "s", Words("a", "b", name="elsewhere"))
    for other in (Words("b", "a"), Words("a", "b", "c"), Words("a")):
        with pytest.raises(TokenizerMismatchError, match="another tokenizer, that of model-a"):
            Datastore.open(tmp_path / "s", other)
        with pytest.raises(TokenizerMismatchError, match="redwood index create"):
            add(tmp_path / "s", [[0]], tokenizer=other)


def test_removing_leaves_other_peoples_files(tmp_path: Path) -> None:
    store_of(tmp_path / "s", TEXTS)
    assert remove(tmp_path / "s") > 0
    assert not (tmp_path / "s").exists()
    with pytest.raises(DatastoreError, match="nothing to remove"):
        remove(tmp_path / "s")
    store_of(tmp_path / "t", TEXTS)
    (tmp_path / "t" / "mine").write_text("x")
    with pytest.raises(DatastoreError, match="'mine', which is no part"):
        remove(tmp_path / "t")
    Datastore.open(tmp_path / "t").verify()


def test_what_is_no_datastore_is_said_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "file", tmp_path / "empty", tmp_path / "absent"):
        with pytest.raises(DatastoreError, match="is no datastore: `redwood index create`"):
            Datastore.open(path)
        with pytest.raises(DatastoreError, match="is no datastore"):
            add(path, [[1]])


def _rewrite(path: Path, **changes: Any) -> None:
    """A manifest with other values, and the digest that goes with them."""
    value = json.loads((path / MANIFEST).read_text())["value"] | changes
    body = json.dumps(value)
    (path / MANIFEST).write_text(f'{{"sha256": "{digest(body)}",\n"value":\n{body}}}\n')


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 2}, "has format 2, and this Redwood reads 1: build it anew"),
        ({"format": "1"}, "has format '1'"),
        ({"chunks": "none"}, "is damaged"),
        ({"more": 1}, "has no field 'more'"),
        ({"tokenizer": {}}, "tokenizer.name is missing"),
    ],
)
def test_a_manifest_of_another_kind_is_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    store_of(tmp_path / "s", TEXTS)
    _rewrite(tmp_path / "s", **changes)
    with pytest.raises(DatastoreError, match=message):
        Datastore.open(tmp_path / "s")
    with pytest.raises(DatastoreError, match=message):
        add(tmp_path / "s", [[1]])
    with pytest.raises(ArgumentError, match="is a datastore already"):  # nothing is overwritten
        create(tmp_path / "s", TOKENIZER)


def test_a_manifest_names_files_of_its_own_folder_only(tmp_path: Path) -> None:
    made = store_of(tmp_path / "s", TEXTS)
    entry = json.loads((tmp_path / "s" / MANIFEST).read_text())["value"]["chunks"][0]
    _rewrite(made.path, chunks=[entry | {"file": "../s/00000001.chunk"}])
    with pytest.raises(DatastoreError, match="is no file name"):
        Datastore.open(made.path)


def test_every_cut_manifest_is_refused(tmp_path: Path) -> None:
    store_of(tmp_path / "s", TEXTS)
    whole = (tmp_path / "s" / MANIFEST).read_bytes()
    for length in range(0, len(whole) - 2, 7):
        (tmp_path / "s" / MANIFEST).write_bytes(whole[:length])
        with pytest.raises(DatastoreError):
            Datastore.open(tmp_path / "s")
    (tmp_path / "s" / MANIFEST).write_bytes(whole.replace(b'"num_values": 16', b'"num_values": 17'))
    with pytest.raises(DatastoreError, match="digest"):
        Datastore.open(tmp_path / "s")


def test_damaged_chunks_are_found(tmp_path: Path) -> None:
    rng = random.Random(1)
    made = store_of(tmp_path / "s", TEXTS)
    file = made.chunks[0].path
    whole, status = file.read_bytes(), file.stat()
    for place in [*range(32), *rng.sample(range(64, len(whole)), 60)]:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << rng.randrange(8)
        file.write_bytes(damaged)
        with pytest.raises(DatastoreError, match="damaged|format"):  # its time has changed
            Datastore.open(made.path)
        os.utime(file, ns=(status.st_mtime_ns, status.st_mtime_ns))
        with pytest.raises(DatastoreError):
            Datastore.open(made.path).verify()
        with pytest.raises(DatastoreError):  # damage does not get a new digest
            add(made.path, [[1]])
    for length in (0, 1, 63, 64, len(whole) // 2, len(whole) - 1, len(whole) + 1):
        file.write_bytes((whole + b"\0")[:length])
        with pytest.raises(DatastoreError, match="bytes instead of"):
            Datastore.open(made.path)
    file.unlink()
    with pytest.raises(DatastoreError, match="cannot read"):
        Datastore.open(made.path)
    file.write_bytes(whole)
    Datastore.open(made.path).verify()


def test_a_wrong_suffix_array_with_a_right_digest_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from redwood.datastore import chunk

    right = chunk.suffix_array
    monkeypatch.setattr(chunk, "suffix_array", lambda values: right(values)[::-1].copy())
    made = store_of(tmp_path / "s", TEXTS)
    with pytest.raises(DatastoreError, match="not in order"):
        made.verify()


def test_a_copy_is_read_in_full_and_believed(tmp_path: Path) -> None:
    import shutil

    made = store_of(tmp_path / "s", TEXTS)
    shutil.copytree(made.path, tmp_path / "copy", copy_function=shutil.copyfile)
    assert documents_in(Datastore.open(tmp_path / "copy")) == TEXTS


def test_reading_goes_on_while_chunks_are_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A writer may remove a chunk between a reader's look at the manifest and at the chunk."""
    path = tmp_path / "s"
    store_of(path, TEXTS)
    read, calls = store.read_manifest, list[int]()

    def then_a_writer_comes(where: Path) -> Any:
        manifest = read(where)
        calls.append(1)
        if len(calls) == 1:
            add(path, [[8, 8]])
        return manifest

    monkeypatch.setattr(store, "read_manifest", then_a_writer_comes)
    assert documents_in(Datastore.open(path)) == [*TEXTS, [8, 8]]


def test_without_the_sorter_the_error_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = store_of(tmp_path / "s", TEXTS)
    monkeypatch.setitem(sys.modules, "pydivsufsort", None)
    with pytest.raises(UnsupportedError, match=r"pip install 'redwood\[index\]'"):
        add(made.path, [[1]])
    assert documents_in(Datastore.open(made.path)) == TEXTS  # reading needs no sorter


def test_a_writer_that_does_not_end_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = store_of(tmp_path / "s", TEXTS)
    monkeypatch.setattr(folder, "_WAIT_S", 0.05)
    with folder.writing(made.path), pytest.raises(RedwoodError, match="another process has been"):
        add(made.path, [[1]])
