"""Streamed weights: the forms they are stored in, the stream, the memory they take, the faults."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import redwood
from conftest import save_model, tiny_llama, tiny_tokenizer
from offload_kit import opened, small_pieces
from redwood.backends.base import AcceptedPath, Nodes
from redwood.backends.load import open_model
from redwood.backends.offload import backend as offload
from redwood.backends.offload import file as offload_file
from redwood.backends.offload import stream as stream_module
from redwood.backends.offload.backend import parse_bytes, resident_bytes
from redwood.backends.offload.forms import WEIGHTS, Form, NativeForm, TorchForm, form_of
from redwood.backends.offload.stream import PAGE, Span, Stream
from redwood.backends.offload.to_device import DevicePieces
from redwood.drafters.base import ModelDrafter
from redwood.errors import ArgumentError, CapacityError, ModelError, UnsupportedError
from redwood.profiling.measure import quick_curve

CPU = torch.device("cpu")


@pytest.mark.parametrize("make", [lambda w: NativeForm(w, 2), TorchForm])
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("cols", [32, 40, 576])
def test_a_form_multiplies_with_what_it_stored(make: Any, weights: str, cols: int) -> None:
    torch.manual_seed(0)
    form: Form = make(weights)
    weight, x = torch.randn(48, cols), torch.randn(5, cols)
    data = torch.from_numpy(form.pack(weight))
    assert len(data) == form.size(48, cols)
    want = x.double() @ weight.double().T
    got = form.multiply(data, 48, x).double()
    error = float((got - want).norm() / want.norm())
    assert error < {"f32": 1e-6, "bf16": 4e-3, "int8": 1.5e-2, "int4": 0.12}[weights]


@pytest.mark.parametrize("weights", WEIGHTS)
def test_rows_of_the_native_form_do_not_see_each_other(weights: str) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(37, 96), torch.randn(64, 96)
    made = []
    for threads in (1, 2, 3):
        form = NativeForm(weights, threads)
        data = torch.from_numpy(form.pack(weight))
        made += [
            form.multiply(data, 64, x),
            torch.cat([form.multiply(data, 64, r[None]) for r in x]),
        ]
    assert all(torch.equal(made[0], other) for other in made[1:])


def test_zeros_and_rows_that_fill_no_unit_are_stored() -> None:
    for form in (NativeForm("int4", 1), TorchForm("int4"), TorchForm("int8")):
        data = torch.from_numpy(form.pack(torch.zeros(16, 64)))
        assert torch.equal(form.multiply(data, 16, torch.ones(2, 64)), torch.zeros(2, 16))
    form = NativeForm("bf16", 1)
    weight = torch.ones(7, 64)
    assert form.multiply(torch.from_numpy(form.pack(weight)), 7, torch.ones(2, 64)).shape == (2, 7)


def test_without_the_extension_weights_are_stored_as_torch_reads_them(
    monkeypatch: pytest.MonkeyPatch, tiny_model_folder: Path
) -> None:
    want = opened(tiny_model_folder)
    monkeypatch.setattr("redwood.backends.offload.forms.has_extension", lambda: False)
    assert isinstance(form_of("bf16", CPU, 1), TorchForm)
    got = opened(tiny_model_folder)
    a, b = (each.extend([Nodes(each.open(), [3, 1, 4, 1, 5])])[0] for each in (want, got))
    torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def _file(folder: Path, sizes: list[int]) -> tuple[Path, list[Span], list[bytes]]:
    """A file of pieces, random but for their length."""
    path, spans, contents, offset = folder / "weights.bin", [], [], 0
    with path.open("wb") as file:
        for size in sizes:
            contents.append(np.random.default_rng(size).bytes(size))
            spans.append(Span(offset, size))
            file.seek(offset)
            file.write(contents[-1])
            offset += -(-size // PAGE) * PAGE
        file.truncate(offset)
    return path, spans, contents


SIZES = [5000, 100, 12288, 1, 9000, 4096, 70000]


def _use(stream: Stream, order: list[int], contents: list[bytes]) -> None:
    for index in order:
        with stream.piece(index) as data:
            assert bytes(data.numpy()) == contents[index]
    stream.end()


@pytest.mark.parametrize("room", [0, 20_000, 1 << 20])
def test_pieces_come_in_any_order_and_are_what_was_written(tmp_path: Path, room: int) -> None:
    path, spans, contents = _file(tmp_path, SIZES)
    stream = Stream(path, spans)
    stream.keep(room)
    for order in (
        [0, 1, 2, 3, 4, 5, 6],
        [6, 5, 4, 3, 2, 1, 0],
        [2, 2, 0],
        [0],
        [4, 1],
        [*range(7)],
    ):
        _use(stream, order, contents)
        _use(stream, order, contents)
    assert stream.held_bytes <= room


def test_what_is_kept_is_read_once_and_the_rest_every_time(tmp_path: Path) -> None:
    path, spans, contents = _file(tmp_path, SIZES)
    stream = Stream(path, spans, buffers=2)
    stream.keep(40_000)
    kept, everything = stream.kept_bytes, list(range(len(SIZES)))
    assert 0 < kept <= 40_000
    _use(stream, everything, contents)
    assert stream.held_bytes == kept
    before = stream.bytes_read
    _use(stream, everything, contents)
    streamed = sum(span.size for span in stream.streamed_spans())
    largest = max(SIZES)
    assert streamed - largest <= stream.bytes_read - before <= streamed + largest
    stream.keep(0)
    assert stream.held_bytes == 0
    _use(stream, everything, contents)


def test_a_stream_learns_the_order_of_use_and_reads_ahead(tmp_path: Path) -> None:
    path, spans, contents = _file(tmp_path, SIZES)
    stream = Stream(path, spans, buffers=3)
    order = [3, 1, 0, 2, 6, 5, 4]
    _use(stream, order, contents)
    before = stream.bytes_read
    for _ in range(5):
        _use(stream, order, contents)
    # Nothing is read in vain: each forward reads each piece once, and two are under way at the end.
    assert stream.bytes_read - before <= 5 * sum(SIZES) + 2 * max(SIZES)


def test_a_file_that_is_cut_off_or_gone_is_one_clear_error(tmp_path: Path) -> None:
    path, spans, contents = _file(tmp_path, SIZES)
    stream = Stream(path, spans)
    os.truncate(path, spans[-1].offset)
    with pytest.raises(ModelError, match="cannot be read: it ends at byte"):
        _use(stream, list(range(7)), contents)
    with pytest.raises(ModelError, match="it was cut off"):
        Stream(path, spans)
    with pytest.raises(ModelError, match="cannot be opened"):
        Stream(tmp_path / "none", spans)


def test_a_disk_error_is_one_clear_error_and_the_next_forward_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, spans, contents = _file(tmp_path, SIZES)
    stream = Stream(path, spans)
    real, wrong = os.preadv, threading.Event()

    def preadv(handle: int, buffers: Any, offset: int) -> int:
        if wrong.is_set() and offset == spans[4].offset:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(handle, buffers, offset)

    monkeypatch.setattr(stream_module.os, "preadv", preadv)
    wrong.set()
    for _ in range(3):
        with pytest.raises(ModelError, match="Input/output error"):
            _use(stream, list(range(7)), contents)
        stream.end()
    wrong.clear()
    _use(stream, list(range(7)), contents)


def test_pieces_are_whole_units_and_the_file_holds_nothing_else() -> None:
    form, raw = NativeForm("bf16", 1), TorchForm("bf16")
    with small_pieces(10_000):
        layout = offload_file.plan(
            {"a": ((100, 64), form), "b": ((3, 5, 64), raw)}, {"table": ((300, 64), raw)}
        )
    matrix = layout.matrices["a"]
    assert sum(part.rows for part in matrix.parts) == 100
    assert all(part.first % 16 == 0 for part in matrix.parts)
    assert layout.matrices["b"].rows == 15
    ends = [span.offset + span.size for span in layout.spans]
    assert all(a <= b.offset < a + PAGE for a, b in zip(ends, layout.spans[1:], strict=False))
    assert layout.size % PAGE == 0 and layout.size - layout.tables["table"] >= 300 * 128


def test_sizes_are_read_as_people_write_them() -> None:
    known = {"2GiB": 2 << 30, "1.5G": 1_500_000_000, "512MB": 512_000_000, "7": 7, "64 kib": 65536}
    assert {text: parse_bytes(text) for text in known} == known
    for wrong in ("", "GiB", "-1GiB", "2 GiBs", "0", "0.3", "two", "nan"):
        with pytest.raises(ArgumentError, match="must be a size such as"):
            parse_bytes(wrong)


def test_too_little_memory_is_refused_with_the_least(tiny_model_folder: Path) -> None:
    backend = opened(tiny_model_folder, memory="10MiB")
    with pytest.raises(
        CapacityError, match=r"memory 0.01GiB is not enough .* needs [\d.]+GiB at"
    ) as e:
        backend.settle()
    least = float(str(e.value).split("needs ")[1].split("GiB")[0])
    enough = opened(tiny_model_folder, memory=f"{least + 0.05}GiB")
    enough.settle()
    assert enough.stream.kept_bytes > 0


def test_weights_make_room_for_what_grows(
    tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = opened(tiny_model_folder, memory=resident_bytes() + (1 << 30))
    backend.settle()
    stream = backend.stream
    row = backend.open()
    (before,) = backend.extend([Nodes(row, [1, 2, 3])])
    backend.commit([AcceptedPath(row, [0, 1, 2])])
    whole = stream.held_bytes
    assert whole == stream.kept_bytes > 0
    assert backend.memory is not None
    full = backend.memory - backend.reserve // 2 + whole // 2
    monkeypatch.setattr(offload, "resident_bytes", lambda: full)
    backend.extend([Nodes(row, [4])])
    assert stream.held_bytes < whole
    backend.truncate(row, 0)
    torch.testing.assert_close(backend.extend([Nodes(row, [1, 2, 3])])[0], before)


def _texts(folder: Path, memory: str | None, drafter: Any, **params: Any) -> list[list[int]]:
    with small_pieces():
        engine = redwood.load(
            folder,
            drafter,
            offload="disk",
            memory=memory,
            weights="bf16",
            budget=24 if drafter else None,
        )
    prompts = [[5, 9, 17, 33], [65, 129, 2, 77, 54, 201], [7] * 20]
    made = engine.generate(prompts, max_tokens=40, ignore_eos=True, **params)
    return [output.token_ids for output in made]


@pytest.mark.parametrize("params", [{"temperature": 0.0}, {"temperature": 0.8, "seed": 3}])
def test_a_text_does_not_depend_on_what_stays_in_memory_or_drafts(
    tiny_model_folder: Path, tiny_draft_folder: Path, params: dict[str, Any]
) -> None:
    held = _texts(tiny_model_folder, "64GiB", None, **params)
    for drafter in (None, "ngram", f"{tiny_draft_folder}+ngram"):
        assert _texts(tiny_model_folder, None, drafter, **params) == held


def test_the_planner_takes_large_trees_where_passes_are_flat(
    tiny_model_folder: Path, tiny_draft_folder: Path
) -> None:
    with small_pieces():
        engine = redwood.load(tiny_model_folder, str(tiny_draft_folder), offload="disk")
    assert engine.planner is not None and engine.planner.most == 128
    curve = quick_curve(engine.target)
    assert [point.nodes for point in curve.points] == [1, 48, 96]


def test_a_drafter_grows_wide_and_deep_where_there_is_room(tiny_draft_folder: Path) -> None:
    _, backend = open_model(str(tiny_draft_folder))
    drafter = ModelDrafter(backend)
    assert drafter._levels(16) == 8 and drafter._levels(64) == 16 and drafter._levels(768) == 24


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"offload": "tape"}, "must be one of disk, ram"),
        ({"offload": "ram"}, "is for a GPU"),
        ({"offload": "disk", "backend": "native"}, "backend native cannot go with offload"),
        ({"offload": "disk", "kv": "f32"}, "kv cannot go with offload"),
        ({"offload": "disk", "weights": "int3"}, "must be one of bf16"),
        ({"offload": "disk", "memory": "much"}, "must be a size"),
        ({"memory": "2GiB"}, "offload, which was not asked for"),
    ],
)
def test_options_that_make_no_sense_are_refused(
    tiny_model_folder: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ArgumentError, match=message):
        open_model(str(tiny_model_folder), **options)


def test_a_truncated_or_foreign_shard_is_one_clear_error(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "broken", tiny_llama(), tiny_tokenizer())
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelError, match="not a whole safetensors file"):
        opened(folder)
    weights.unlink()
    with pytest.raises(ModelError, match="no safetensors"):
        opened(folder)


def test_a_system_without_positioned_reads_is_refused(
    tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "preadv")
    with pytest.raises(UnsupportedError, match="preadv"):
        open_model(str(tiny_model_folder), offload="disk")


@pytest.mark.parametrize("room", [0, 30_000, 1 << 20])
def test_pieces_on_a_device_are_the_pieces_of_the_file(tmp_path: Path, room: int) -> None:
    path, spans, contents = _file(tmp_path, SIZES)
    pieces = DevicePieces(Stream(path, spans), CPU)
    pieces.keep(room)
    for order in ([*range(7)], [*range(7)], [5, 2, 0], [*range(7)]):
        for index in order:
            with pieces.piece(index) as data:
                assert bytes(data.numpy()) == contents[index]
        pieces.host.end()
    assert pieces.held_bytes <= pieces.kept_bytes <= room
    before = pieces.host.bytes_read
    pieces.keep(0)
    for index in range(7):
        with pieces.piece(index) as data:
            assert bytes(data.numpy()) == contents[index]
    assert pieces.held_bytes == 0 and pieces.host.bytes_read > before


def test_whether_a_piece_stays_is_one_look_whatever_is_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, spans, _ = _file(tmp_path, [4096] * 60)
    stream = Stream(path, spans)

    def held() -> list[bool]:
        found = []
        for index in range(60):
            with stream.piece(index) as data:
                found.append(stream.is_held(data))
        stream.end()
        return found

    stream.keep(1 << 20)
    assert held() == [False] * 60 and held() == [True] * 60
    looks, usual = [0], torch.Tensor.data_ptr

    def data_ptr(self: torch.Tensor) -> int:
        looks[0] += 1
        return usual(self)

    monkeypatch.setattr(torch.Tensor, "data_ptr", data_ptr)
    assert held() == [True] * 60 and looks[0] == 60
    stream.keep(30 * 4096)
    assert sum(held()) == 30 == len(stream._addresses)
    stream.keep(0)
    assert held() == [False] * 60 and not stream._addresses


def test_a_piece_that_is_lent_twice_at_once_is_held_once(tmp_path: Path) -> None:
    path, spans, contents = _file(tmp_path, SIZES)
    stream = Stream(path, spans)
    stream.keep(1 << 20)
    with stream.piece(0) as outer, stream.piece(0) as inner:
        assert bytes(inner.numpy()) == bytes(outer.numpy()) == contents[0]
    with stream.piece(0) as data:
        assert stream.is_held(data) and len(stream._addresses) == len(stream._held)
    stream.keep(0)
    assert not stream._addresses
