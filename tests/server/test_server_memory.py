"""Finished answers as drafts: for the same key, for no other, and never in the text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import redwood
from cli_kit import Ran
from redwood.datastore import Namespaces
from redwood.drafters.base import ModelDrafter, NgramDrafter
from redwood.errors import ArgumentError
from redwood.server.auth import Keys
from redwood.server.memory import Memory
from server_kit import Live

pytest.importorskip("pydivsufsort")

KEYS = ["first-key-1", "second-key-2"]


def _namespaces(folder: Path, engine: redwood.Engine) -> Namespaces:
    return Namespaces(folder, engine.tokenizer)


def _answer(live: Live, key: str, **changes: Any) -> dict[str, Any]:
    live.http.headers["authorization"] = f"Bearer {key}"
    # Plain words, said once: nothing to draft from but what was kept.
    response = live.chat(max_tokens=24, ignore_eos=True, **changes)
    assert response.status_code == 200, response.text
    return dict(response.json())


def _drafted(answer: dict[str, Any]) -> int:
    return int(answer["usage"]["redwood"]["num_accepted_tokens"])


def test_a_key_drafts_from_its_own_answers_and_no_other(
    tiny_model_folder: Path, tmp_path: Path
) -> None:
    engine = redwood.load(tiny_model_folder, "ngram", backend="eager", budget=12)
    kept = _namespaces(tmp_path / "kept", engine)
    live = Live(engine, KEYS, Memory(kept, engine.drafter, Keys(KEYS).namespace))
    try:
        hot = {"temperature": 1.0, "seed": 11}
        before = _answer(live, KEYS[0], **hot)
        assert kept.flush() == 1
        again, other = _answer(live, KEYS[0], **hot), _answer(live, KEYS[1], **hot)
    finally:
        live.stop()
    texts = {each["choices"][0]["message"]["content"] for each in (before, again, other)}
    assert len(texts) == 1
    assert _drafted(again) > 15 > 5 > _drafted(before)
    assert _drafted(other) == _drafted(before)
    # Keys that change places keep what is theirs.
    assert Keys(KEYS).namespace("key-1") == Keys(KEYS[::-1]).namespace("key-2")
    assert Keys().namespace("open") == "open"


def test_answers_are_shared_where_the_owner_of_the_server_says_so(
    tiny_model_folder: Path, tmp_path: Path
) -> None:
    engine = redwood.load(tiny_model_folder, "ngram", backend="eager", budget=12)
    kept = _namespaces(tmp_path / "kept", engine)
    live = Live(engine, KEYS, Memory(kept, engine.drafter, lambda owner: "everybody"))
    try:
        hot = {"temperature": 1.0, "seed": 11}
        _answer(live, KEYS[0], **hot)
        kept.flush()
        assert _drafted(_answer(live, KEYS[1], **hot)) > 15
    finally:
        live.stop()


def test_a_broken_store_costs_drafts_and_no_answer(tiny_model_folder: Path, tmp_path: Path) -> None:
    engine = redwood.load(tiny_model_folder, "ngram", backend="eager", budget=12)
    kept = _namespaces(tmp_path / "kept", engine)
    live = Live(engine, (), Memory(kept, engine.drafter, Keys().namespace))
    try:
        want = _answer(live, "none")
        kept.flush()
        for file in (tmp_path / "kept").rglob("*.chunk"):
            file.write_bytes(file.read_bytes()[:-7])
        fresh = _namespaces(tmp_path / "kept", engine)
        live.service.worker._memory = Memory(fresh, engine.drafter, Keys().namespace)
        assert _answer(live, "none")["choices"] == want["choices"]
    finally:
        live.stop()


def test_without_ngrams_nothing_could_be_drafted(tiny_model_folder: Path, tmp_path: Path) -> None:
    engine = redwood.load(tiny_model_folder, tiny_model_folder, backend="eager")
    assert isinstance(engine.drafter, ModelDrafter)
    kept = _namespaces(tmp_path, engine)
    with pytest.raises(ArgumentError, match="ngram"):
        Memory(kept, engine.drafter, Keys().namespace)
    Memory(kept, NgramDrafter(), Keys().namespace)


@pytest.mark.parametrize(
    ("args", "match"),
    [
        (["--share-answers"], "--keep-answers"),
        (["--keep-every", "5"], "--keep-answers"),
        (["--keep-answers", "x", "--keep-every", "0"], "above 0"),
    ],
)
def test_options_that_need_another_are_refused(args: list[str], match: str) -> None:
    ran = Ran("serve", *args)
    assert ran.code == 2 and match in ran.stderr
