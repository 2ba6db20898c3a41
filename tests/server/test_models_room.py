"""Memory of several models: what is predicted, and what is left for keys and values."""

from __future__ import annotations

from pathlib import Path

import pytest

import redwood
from redwood.errors import ArgumentError, ModelError
from redwood.models import PACKAGED
from redwood.server.models import room
from redwood.server.models.room import Room, default_room, mapped_bytes, predicted

GIB = 1 << 30


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def test_files_say_what_a_model_takes(tiny_model_folder: Path, tiny_draft_folder: Path) -> None:
    target, draft = _size(tiny_model_folder), _size(tiny_draft_folder)
    assert predicted([str(tiny_model_folder)]) == target
    assert predicted([str(tiny_model_folder), str(tiny_draft_folder)]) == target + draft
    quarter = predicted([str(tiny_model_folder)], "int4")
    assert quarter is not None and 0.2 * target < quarter < 0.4 * target
    assert predicted([str(tiny_model_folder)], None, "float32") == 2 * target


def test_a_packaged_model_is_known_before_it_is_fetched() -> None:
    for name, model in PACKAGED.items():
        assert predicted([name]) == model.size_bytes
    assert predicted(["organisation/model"]) is None  # of the hub: seen when it is loaded


def test_a_model_that_is_not_there_is_said(tmp_path: Path) -> None:
    for name in (str(tmp_path / "gone"), "./gone", "no-such-model", str(tmp_path / "gone.gguf")):
        with pytest.raises(ModelError):
            predicted([name])


def test_a_native_model_takes_what_is_mapped(tiny_model_folder: Path) -> None:
    engine = redwood.load(str(tiny_model_folder), backend="native", threads=1)
    assert 0 < mapped_bytes(engine) <= 2 * _size(tiny_model_folder)


def test_keys_and_values_get_what_weights_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "free_bytes", lambda: 100 * GIB)
    assert default_room(4).most == 50 * GIB
    two = Room(50 * GIB, 2)
    # 30 of 50 GiB are not taken yet and stay for weights; both models share the rest.
    assert two.share(20 * GIB) == pytest.approx(70 / 100 / 2)
    # What other models have mapped counts as free, and is not.
    assert two.share(20 * GIB, mapped=10 * GIB) == pytest.approx(60 / 100 / 2)
    assert two.share(60 * GIB) == 0.5  # more than was meant
    assert Room(500 * GIB, 2).share(0) == 0.0
    assert Room(None, 2).share(20 * GIB) == 0.5
    monkeypatch.setattr(room, "free_bytes", lambda: None)
    assert default_room(2).most is None and two.share(0) == 0.5


def test_a_part_of_free_memory_may_be_kept(tiny_model_folder: Path) -> None:
    def pages(**how: float | str) -> int:
        return redwood.load(
            str(tiny_model_folder), "none", backend="native", threads=1, **how
        ).prefixes.max_pages

    assert 0.3 * pages() < pages(kv_cache=0.1) < 0.7 * pages()
    assert 0.3 * pages() < pages(kv_cache_share=0.1) < 0.7 * pages()
    assert pages(kv_cache=0.0) == pages(kv_cache_share=0.0) == 0
    for wrong in ({"kv_cache": -0.5}, {"kv_cache_share": 1.5}, {"kv_cache_share": -0.1}):
        with pytest.raises(ArgumentError, match="kv_cache"):
            pages(**wrong)
    with pytest.raises(ArgumentError, match="for engines without kv_cache"):
        pages(kv_cache="1MiB", kv_cache_share=0.1)
    with pytest.raises(ArgumentError, match="kv_cache 100 has no room for a page"):
        pages(kv_cache=100)
