"""Tables in use: the same trees after a restart, keys apart, commands that fill and show them."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_table_file import TARGET, learn

import redwood
from cli_kit import Ran, press_ctrl_c
from redwood.algorithms.source_rates import LearnedRates
from redwood.algorithms.successors import successor_table
from redwood.drafters.base import NgramDrafter, attach, parts_of
from redwood.engine.tables import tables_of
from redwood.errors import ArgumentError, TableError
from redwood.server.auth import Keys
from redwood.server.tables import own_tables
from redwood.table import KeyTables, read_info, target_id
from redwood.table.reading import CHUNK, read_part
from redwood.table.reading import parts_of as parts_of_text
from server_kit import Live

KEYS = ["first-key-1", "second-key-2"]
PROMPT = "Tom went to the market."


def _engine(folder: Path, **options: Any) -> redwood.Engine:
    return redwood.load(folder, "auto", backend="eager", budget=8, **options)


def _trees(engine: redwood.Engine) -> list[tuple[list[int], list[int]]]:
    pieces = list(engine.stream(PROMPT, max_tokens=24, ignore_eos=True))
    return [(piece.tree.token_list, piece.tree.parent_list) for piece in pieces]


def test_a_restart_gives_the_same_trees(tiny_model_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "t"
    engine = _engine(tiny_model_folder, table=path)
    assert [type(part) for part in parts_of(engine.drafter)] == [NgramDrafter]
    cold = _trees(engine)
    engine.close()
    engine.close()
    before = path.read_bytes()
    made = []
    for _ in range(2):
        path.write_bytes(before)
        with _engine(tiny_model_folder, table=path) as again:
            made.append(_trees(again))
    warm = _trees(engine)  # the engine that learned it goes on
    assert made[0] == made[1] == warm
    assert len(warm) < len(cold)
    path.write_bytes(before)
    left = _engine(tiny_model_folder, table=path, table_bytes=1 << 20)
    _trees(left)
    del left
    gc.collect()
    assert read_info(path).rows > 0 and path.read_bytes() != before  # collected: saved


def test_what_the_user_named_is_an_error_at_the_start(
    tiny_model_folder: Path, tiny_draft_folder: Path, tmp_path: Path
) -> None:
    with _engine(tiny_model_folder, table=tmp_path / "t") as engine:
        _trees(engine)
    with pytest.raises(TableError, match="another model.*other weights"):
        _engine(tiny_draft_folder, table=tmp_path / "t")
    whole = (tmp_path / "t").read_bytes()
    (tmp_path / "t").write_bytes(whole[:-1])
    with pytest.raises(TableError, match="damaged"):
        _engine(tiny_model_folder, table=tmp_path / "t")
    with pytest.raises(ArgumentError, match="name table or auto"):
        redwood.load(tiny_model_folder, "ngram", backend="eager", table=tmp_path / "u")
    with pytest.raises(ArgumentError, match="name table or auto"):
        redwood.load(tiny_model_folder, "none", backend="eager", table_bytes=1 << 20)
    with pytest.raises(ArgumentError, match="512 KiB"):
        _engine(tiny_model_folder, table_bytes=0)


def test_the_identity_follows_weights_not_places(tiny_model_folder: Path, tmp_path: Path) -> None:
    import shutil

    tokenizer = redwood.load(tiny_model_folder, backend="eager").tokenizer
    first = target_id(str(tiny_model_folder), tokenizer, 300)
    copy = shutil.copytree(tiny_model_folder, tmp_path / "copy")
    assert first.matches(target_id(str(copy), tokenizer, 300))
    (weights,) = copy.glob("*.safetensors")
    data = bytearray(weights.read_bytes())
    data[-100] ^= 1
    weights.write_bytes(data)
    assert not first.matches(target_id(str(copy), tokenizer, 300))


def test_an_empty_table_of_its_own_hides_the_shared_one(tiny_model_folder: Path) -> None:
    engine = _engine(tiny_model_folder)
    (part,) = tables_of([engine.drafter])
    _trees(engine)
    shared = part.table
    assert shared is not None
    before = shared.entries()
    tables = KeyTables(1 << 20)
    key = engine.add(PROMPT, redwood.SamplingParams(max_tokens=16))
    attach(engine.drafter, key, table=tables.table("mine"))
    while engine.busy:
        engine.step()
    assert np.array_equal(shared.entries(), before) and tables.table("mine").rows > 0


def _answer(live: Live, key: str) -> dict[str, Any]:
    live.http.headers["authorization"] = f"Bearer {key}"
    response = live.chat(max_tokens=24, ignore_eos=True, temperature=1.0, seed=11)
    assert response.status_code == 200, response.text
    return dict(response.json())


def _accepted(answer: dict[str, Any]) -> int:
    return int(answer["usage"]["redwood"]["num_accepted_tokens"])


def test_keys_of_a_server_do_not_mix(tiny_model_folder: Path) -> None:
    engine = _engine(tiny_model_folder)
    (part,) = tables_of([engine.drafter])
    live = Live(engine, KEYS)

    def answer(key: str) -> dict[str, Any]:
        part.reliability.load({"cells": [], "hits": [], "trials": []})  # they are shared, no text
        return _answer(live, key)

    try:
        first, again = answer(KEYS[0]), answer(KEYS[0])
        other, other_again = answer(KEYS[1]), answer(KEYS[1])
    finally:
        live.stop()
    assert len({each["choices"][0]["message"]["content"] for each in (first, again, other)}) == 1
    assert _accepted(other) == _accepted(first) < _accepted(again) == _accepted(other_again)
    assert part.table is not None and part.table.rows == 0


def test_without_keys_there_is_one_table(tiny_model_folder: Path) -> None:
    engine = _engine(tiny_model_folder)
    live = Live(engine)
    try:
        assert _accepted(_answer(live, "none")) < _accepted(_answer(live, "none"))
        assert live.service.tables is None
    finally:
        live.stop()


def test_tables_of_keys_come_back_from_their_folder(
    tiny_model_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    engine, name = _engine(tiny_model_folder), str(tiny_model_folder)
    tables = own_tables(engine, Keys(KEYS).namespace, tmp_path / "kept", name)
    for key, seed in (("a", 1), ("b", 2)):
        learn(tables.tables.table(key), seed)
    second = own_tables(engine, Keys(KEYS).namespace, tmp_path / "kept", name)
    assert "another process" in caplog.text
    second.close()
    tables.close()
    files = sorted((tmp_path / "kept").rglob("*.table"))
    assert len(files) == 2 and all("a" != file.stem and len(file.stem) == 32 for file in files)
    files[0].write_bytes(files[0].read_bytes()[:-3])
    broken = files[0].read_bytes()
    again = own_tables(engine, Keys(KEYS).namespace, tmp_path / "kept", name)
    assert sorted(again.tables.table(key).rows for key in "ab") == [0, 50]
    for key in "ab":
        learn(again.tables.table(key), 5)
    again.close()
    assert "is damaged" in caplog.text and files[0].read_bytes() == broken
    assert read_info(files[1]).rows == 100


def test_tables_share_one_budget(tmp_path: Path) -> None:
    tables = KeyTables(4 << 19, folder=tmp_path, target=TARGET)
    for number in range(8):
        learn(tables.table(str(number)), number)
        tables.table("0")  # always in use
    assert len(tables) == 4 and tables.nbytes <= 4 << 19
    assert tables.table("0").rows == 50
    assert tables.table("1").rows == 50  # it went, and comes back from its file
    tables.close()
    forgetful = KeyTables(2 << 19, most=1)
    learn(forgetful.table("a"))
    forgetful.table("b")
    assert forgetful.table("a").rows == 0


def test_text_that_is_read_teaches_every_row(tiny_model_folder: Path) -> None:
    engine = _engine(tiny_model_folder)
    (part,) = tables_of([engine.drafter])
    table = part.table
    assert table is not None
    text = engine.encode("Tom bought apples, and Anna bought pears. " * 20)
    parts = list(parts_of_text(text, 200))
    assert [token for each in parts for token in each] == text and len(parts) > 1
    read = list[int]()
    for each in parts:
        read_part(engine.target, table, each, read.append)
    assert table.rows == sum(read) == len(text)
    # What it says is what the target says after each token, across the ends of chunks, too.
    own = list(range(5, 150))
    fresh = successor_table()
    read_part(engine.target, fresh, own)
    for size in (1, 2, 3, 20, CHUNK, CHUNK + 1, CHUNK + 2, 145):
        (best,) = engine.generate(own[:size], max_tokens=1, ignore_eos=True).token_ids
        (order, successors), *_ = fresh.find(own[:size])
        assert order == min(size, 3) and successors[0][0] == best


@pytest.fixture
def sources(tmp_path: Path) -> list[str]:
    (tmp_path / "p.jsonl").write_text("".join(f'{{"prompt": "Say {i}."}}\n' for i in range(6)))
    (tmp_path / "text.txt").write_text("Tom went to the market. " * 20)
    return [str(tmp_path / "text.txt"), "--prompts", str(tmp_path / "p.jsonl")]


def test_create_goes_on_where_it_was_interrupted(
    tiny_model_folder: Path, tmp_path: Path, sources: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "t"
    args = ["table", "create", str(path), *sources, "--target", str(tiny_model_folder)]
    args += ["--backend", "eager", "--together", "2", "--max-tokens", "12"]
    press_ctrl_c(monkeypatch, after=16)
    ran = Ran(*args)
    assert ran.code == 130 and "goes on from there" in ran.stderr
    (done,) = read_info(path).filled.values()
    assert 0 < done < 6 and done % 2 == 0
    made = Ran(*args, "--json").json
    assert made["sources"] == 2 and made["rows"] > 100
    assert Ran(*args, "--json").json["rows"] == made["rows"]  # all of it is in
    assert Ran("table", "info", str(path), "--json").json["entries"] == made["entries"]
    assert "vocab size" in Ran("table", "info", str(path)).stdout
    assert Ran("table", "verify", str(path)).stdout.endswith("intact\n")
    assert Ran("table", "clear", str(path), "--json").json["freed_bytes"] > 0
    assert json.loads(Ran("table", "info", str(path), "--json").stdout)["entries"] == 0
    path.write_bytes(path.read_bytes()[:-5])
    for command in ("info", "verify", "clear"):
        assert "damaged" in Ran("table", command, str(path)).error()


def test_generate_keeps_a_table(tiny_model_folder: Path, tmp_path: Path) -> None:
    args = ["generate", PROMPT, "--target", str(tiny_model_folder), "--backend", "eager"]
    args += ["--raw", "--max-tokens", "24", "--ignore-eos", "--drafter", "auto", "--json"]
    args += ["--table", str(tmp_path / "t"), "--table-size", "1MiB", "--budget", "8"]
    cold, warm = Ran(*args).json, Ran(*args).json
    assert cold["token_ids"] == warm["token_ids"]
    assert warm["stats"]["target_passes"] < cold["stats"]["target_passes"]


@pytest.mark.parametrize(
    ("args", "match"),
    [
        (["generate", "x", "--drafter", "ngram", "--table", "y"], "--drafter auto"),
        (["chat", "--drafter", "ngram", "--table-size", "1MiB"], "--table-size: no drafter"),
        (["serve", "--drafter", "ngram", "--shared-table"], "--shared-table: no drafter"),
        (["serve", "--drafter", "ngram", "--table", "y", "--port", "0"], "--drafter auto"),
        (["generate", "x", "--drafter", "auto", "--table-size", "much"], "not a size"),
        (["table", "create", "y"], "nothing to fill"),
    ],
)
def test_options_that_do_not_fit_are_refused(args: list[str], match: str) -> None:
    assert match in Ran(*args).error(2)


def test_learned_rates_are_taken_from_the_first_file_alone(tmp_path: Path) -> None:
    rates = LearnedRates()
    rates.rates.count(3, True)
    tables = KeyTables(1 << 21, folder=tmp_path, target=TARGET, rates=rates)
    for number, key in enumerate("ab"):
        learn(tables.table(key), number)
    tables.close()
    rates = LearnedRates()
    again = KeyTables(1 << 21, folder=tmp_path, target=TARGET, rates=rates)
    again.table("a")
    assert rates.to_dict()["trials"] == [1.0]
    rates.rates.count(3, True)
    again.table("b")
    assert rates.to_dict()["trials"] == [2.0]
    again.close()
