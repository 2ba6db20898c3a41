"""Mixtures whose experts stream: what is read, what stays, and that it changes nothing."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_families import check_logits
from test_offload import CPU, SIZES, _file

import redwood
from conftest import tiny_tokenizer
from families_kit import family_model
from gemma_kit import MODELS, gemma_model
from hybrids_kit import hybrid_model
from offload_kit import opened, small_pieces
from redwood.backends.base import AcceptedPath, Nodes
from redwood.backends.offload import file as offload_file
from redwood.backends.offload import load as offload_load
from redwood.backends.offload import stream as stream_module
from redwood.backends.offload.backend import OffloadBackend
from redwood.backends.offload.stream import Stream
from redwood.backends.offload.streamed_experts import StreamedExperts
from redwood.backends.offload.to_device import DevicePieces
from redwood.errors import ModelError, UnsupportedError

WHOLE = ("gptoss",)  # whose folders hold stacks of experts, as Transformers' modules do
FAMILIES = ("qwen3moe", "mixtral", "qwen2moe", "olmoe", "glm4moe", *WHOLE)


def saved(tmp_path: Path, family: str, **changes: Any) -> tuple[Path, Any]:
    model = family_model(family, **changes)
    model.save_pretrained(tmp_path / family)
    return tmp_path / family, model


def streamed(backend: OffloadBackend) -> list[StreamedExperts]:
    return [each for each in backend.model.modules() if isinstance(each, StreamedExperts)]


class Spy:
    """What a backend reads of its file, and what its routers choose."""

    def __init__(self, backend: OffloadBackend, monkeypatch: pytest.MonkeyPatch) -> None:
        self.read: set[int] = set()
        self.chosen: set[tuple[int, int]] = set()
        stream, usual = backend.stream, stream_module._read
        piece_at = {span.offset: piece for piece, span in enumerate(stream._spans)}

        def read(handle: int, direct: bool, into: Any, offset: int) -> None:
            self.read.add(piece_at[offset])
            usual(handle, direct, into, offset)

        monkeypatch.setattr(stream_module, "_read", read)
        for layer, experts in enumerate(streamed(backend)):
            experts.register_forward_pre_hook(
                lambda _, args, layer=layer: self.chosen.update(
                    (layer, int(e)) for e in args[1].unique()
                )
            )
        self.pieces = {
            (layer, expert): {
                part.piece for parts in each._parts.values() for part in parts[expert]
            }
            for layer, each in enumerate(streamed(backend))
            for expert in range(each._count)
        }
        self.of_experts = set().union(*self.pieces.values())

    def wanted(self) -> set[int]:
        return set().union(*(self.pieces[each] for each in self.chosen))

    def forget(self) -> None:
        self.read, self.chosen = set(), set()


def tree(backend: OffloadBackend, tokens: list[int]) -> None:
    row = backend.open()
    backend.extend([Nodes(row, tokens, [-1] + [0] * (len(tokens) - 1))])
    backend.release(row)


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_that_no_node_has_are_not_read(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, model = saved(tmp_path, family)
    if family not in WHOLE:  # what the file holds of one expert is read for its pieces, not all
        monkeypatch.setattr(offload_file, "load_stock", None)
    backend = opened(folder)
    check_logits(backend, model, limit=2e-4)
    spy = Spy(backend, monkeypatch)
    layers = len(streamed(backend))
    assert layers >= 2 and len(spy.of_experts) > layers
    for tokens in ([5], [7], [9], [3, 4]):
        spy.forget()
        tree(backend, tokens)
        assert spy.read & spy.of_experts == spy.wanted()
        assert len(spy.chosen) < len(spy.pieces)
        ordinary = set(range(len(backend.stream._spans))) - spy.of_experts
        # Three buffers are read ahead: at the end they hold what the next forward begins with.
        assert len(ordinary - spy.read) <= 3
    # Nothing is read twice: a forward reads as many bytes as its pieces have.
    spans, before = backend.stream._spans, backend.stream.bytes_read
    for _ in range(4):
        tree(backend, [3, 4])
    each = sum(spans[p].size for p in ordinary | spy.wanted())
    largest = 3 * max(span.size for span in spans)
    assert abs(backend.stream.bytes_read - before - 4 * each) <= largest


@pytest.mark.parametrize("family", ["qwen3moe", "gptoss"])
@pytest.mark.parametrize("params", [{"temperature": 0.0}, {"temperature": 0.8, "seed": 3}])
def test_texts_are_those_of_the_model_in_memory(
    family: str, params: dict[str, Any], tmp_path: Path
) -> None:
    wide = {"initializer_range": 0.05, "max_position_embeddings": 512, "vocab_size": 300}
    folder = saved(tmp_path, family, **wide)[0]
    tiny_tokenizer().save_pretrained(folder)

    def texts(drafter: Any, **options: Any) -> list[list[int]]:
        with small_pieces():
            engine = redwood.load(folder, drafter, weights="f32", **options)
        prompts = [[5, 9, 17, 33] * 3, [65, 29, 2, 77, 54, 91], [7] * 20]
        made = engine.generate(prompts, max_tokens=30, ignore_eos=True, **params)
        return [output.token_ids for output in made]

    held = texts(None, backend="native", kv="f32")
    for drafter in (None, "ngram"):
        for memory in (None, "64GiB"):
            assert texts(drafter, offload="disk", memory=memory) == held


def test_a_row_has_the_same_bits_in_any_company(tmp_path: Path) -> None:
    for family in ("qwen3moe", "gptoss"):
        experts = streamed(opened(saved(tmp_path, family)[0]))[0]
        x = torch.randn(9, 32)
        chosen = torch.stack([torch.randperm(5)[:2] for _ in range(9)])
        weights = torch.rand(9, 2)
        together = experts(x, chosen, weights)
        for row in range(9):
            one = slice(row, row + 1)
            assert torch.equal(together[one], experts(x[one], chosen[one], weights[one]))
            turned = experts(x[one], chosen[one].flip(1), weights[one].flip(1))
            assert torch.equal(together[one], turned)


def test_what_stays_of_experts_is_what_was_used_and_no_more_than_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = opened(saved(tmp_path, "qwen3moe", num_experts=12)[0])
    stream, spy = backend.stream, Spy(backend, monkeypatch)
    tree(backend, [5])
    ordinary = sum(
        stream.size_of([p]) for p in range(len(stream._spans)) if p not in spy.of_experts
    )
    one = stream.size_of([min(spy.of_experts)])
    for extra in (0, 5 * one, 1 << 30):
        room = ordinary + extra
        stream.keep(room)
        most = 0
        for token in (5, 6, 7, 5, 5, 5):
            spy.forget()
            tree(backend, [token])
            most = max(most, stream.held_bytes)
            assert stream.held_bytes <= min(room, stream.kept_bytes)
        left = spy.read & spy.of_experts
        assert left <= spy.wanted()
        # The same token again: what there was room for is not read again, and the rest is.
        kept = min(len(spy.wanted()), extra // one)
        assert len(spy.wanted()) - len(left) == kept and most >= ordinary + kept * one
        assert not spy.read - spy.of_experts
    stream.keep(ordinary + one)
    assert stream.held_bytes <= ordinary + one
    stream.keep(ordinary // 2)
    assert stream.held_bytes <= ordinary // 2 and stream._taken == 0
    tree(backend, [8])


def test_pieces_of_groups_come_when_they_are_announced(tmp_path: Path) -> None:
    path, spans, contents = _file(tmp_path, [*SIZES, *SIZES])
    stream = Stream(path, spans, groups=[[2, 3, 4], [8, 9, 10, 11]])
    generator = torch.Generator().manual_seed(0)

    def use(*pieces: int) -> None:
        for index in pieces:
            with stream.piece(index) as data:
                assert bytes(data.numpy()) == contents[index]

    for room in (0, 30_000, 1 << 20):
        stream.keep(room)
        for forward in range(12):
            some = [p for p in (2, 3, 4) if torch.rand(1, generator=generator) < 0.5]
            more = [p for p in (8, 9, 10, 11) if torch.rand(1, generator=generator) < 0.5]
            use(0, 1)
            stream.announce(0, some)
            use(*some)
            use(5, 6, 7)
            stream.announce(1, more)
            if forward % 5 != 3:  # a forward that fails in the middle
                use(*more, 12, 13)
            stream.end()
            assert stream.held_bytes <= room
    use(9, 3, 0, 13)  # not as announced, and slower


@pytest.mark.parametrize("room", [0, 30_000, 1 << 20])
def test_pieces_of_groups_on_a_device(tmp_path: Path, room: int) -> None:
    path, spans, contents = _file(tmp_path, [*SIZES, *SIZES])
    pieces = DevicePieces(Stream(path, spans, groups=[[2, 3, 4], [8, 9, 10, 11]]), CPU)
    pieces.keep(room)
    for some, more in (([2], [9, 11]), ([2, 4], []), ([3], [9, 11]), ([3], [8])):
        for group, order in ((None, [0, 1]), (0, some), (None, [5, 6, 7]), (1, more), (None, [12])):
            if group is not None:
                pieces.announce(group, order)
            for index in order:
                with pieces.piece(index) as data:
                    assert bytes(data.numpy()) == contents[index]
        pieces.host.end()
        assert pieces.held_bytes <= pieces.kept_bytes <= room


def test_a_disk_that_fails_at_an_expert_ends_the_request_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = opened(saved(tmp_path, "mixtral")[0])
    row = backend.open()
    (want,) = backend.extend([Nodes(row, [4])])
    backend.truncate(row, 0)
    real, wrong = os.preadv, {backend.stream._spans[p].offset for p in backend.stream._some}

    def preadv(handle: int, buffers: Any, offset: int) -> int:
        if offset in wrong:
            raise OSError(5, os.strerror(5))
        return real(handle, buffers, offset)

    monkeypatch.setattr(stream_module.os, "preadv", preadv)
    for _ in range(2):
        with pytest.raises(ModelError, match="Input/output error"):
            backend.extend([Nodes(row, [4])])
    wrong.clear()
    (got,) = backend.extend([Nodes(row, [4])])
    assert torch.equal(got, want)
    backend.commit([AcceptedPath(row, [0])])


def test_an_expert_of_another_shape_is_refused_and_one_that_is_missing(tmp_path: Path) -> None:
    folder, _ = saved(tmp_path, "qwen3moe")
    file = folder / "model.safetensors"
    state = load_file(file)
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    for changed in (
        {**state, name: torch.ones(47, 32)},
        {k: v for k, v in state.items() if k != name},
    ):
        save_file(changed, file, {"format": "pt"})
        with pytest.raises(ModelError):
            opened(folder)


@pytest.mark.parametrize("name", sorted(MODELS))
def test_what_parts_of_a_model_compute_at_load_is_computed_by_them(
    name: str, tmp_path: Path
) -> None:
    model = gemma_model(name)
    model.save_pretrained(tmp_path)
    backend, tokens = opened(tmp_path), [3, 1, 4, 1, 5, 9, 2, 6]
    (got,) = backend.extend([Nodes(backend.open(), tokens)])
    with torch.no_grad():
        torch.testing.assert_close(
            got, model(torch.tensor([tokens])).logits[0], atol=2e-4, rtol=2e-4
        )


def test_recurrent_layers_are_refused_before_a_file_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hybrid_model("qwen35").save_pretrained(tmp_path)
    monkeypatch.setattr(offload_load, "stored_file", lambda *_: pytest.fail("a file is written"))
    with pytest.raises(UnsupportedError, match="recurrent layers, which are not offloaded"):
        opened(tmp_path)
