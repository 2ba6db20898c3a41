"""The lines between ranks: what they carry, and how each end learns of the other's."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import parallel_kit as kit
from cli_kit import Ran
from conftest import tiny_llama
from redwood.backends.base import AcceptedPath, Nodes
from redwood.backends.parallel import backend as parallel
from redwood.backends.parallel import ranks as ranks_module
from redwood.backends.parallel.load import _device
from redwood.backends.parallel.ranks import About, Line, Place, Ranks, find_place, join
from redwood.errors import ArgumentError, CapacityError, ModelError, ParallelError
from server_kit import wait_for

PLACE = Place(0, 0, 2, True)
ABOUT = About("/model", {"config.json": "1", "the weights": "2"}, {"capacity": 64})


class _Store:
    """A store for the threads of one process."""

    def __init__(self) -> None:
        self._values: dict[str, str] = {}

    def set(self, key: str, value: str, /) -> None:
        self._values[key] = value

    def get(self, key: str, /) -> bytes:
        wait_for(lambda: key in self._values)
        return self._values[key].encode()


@pytest.fixture
def left() -> list[str]:
    """What would have ended a process."""
    return []


@pytest.fixture
def ranks(left: list[str]) -> Iterator[tuple[Ranks, Ranks]]:
    both = kit.pair(left.append)
    yield both
    for each in both:
        each.close()


def test_messages_come_in_order_and_say_who_sent_them(ranks: tuple[Ranks, Ranks]) -> None:
    for message in (["extend", 1], ["commit", [2, None]]):
        ranks[0].send(message)
        assert ranks[1].receive() == (0, message)
    ranks[1].send(["seen"])
    assert ranks[0].receive() == (1, ["seen"])


def test_a_goodbye_ends_the_other_in_peace(ranks: tuple[Ranks, Ranks], left: list[str]) -> None:
    ranks[0].close()
    assert ranks[1].receive() == (0, ["end"])
    time.sleep(0.1)
    assert left == []


def test_a_reason_to_end_is_told(ranks: tuple[Ranks, Ranks], left: list[str]) -> None:
    ranks[1].fail("rank 1 is out of memory")
    wait_for(lambda: left)
    assert left == ["error: rank 1 is out of memory: rank 0 ends, too\n"]


def test_idle_lines_are_kept_by_their_beats(
    monkeypatch: pytest.MonkeyPatch, left: list[str]
) -> None:
    monkeypatch.setattr(ranks_module, "BEAT_S", 0.05)
    monkeypatch.setattr(ranks_module, "SILENCE_S", 0.5)
    first, second = kit.pair(left.append)
    time.sleep(1.2)
    first.send(["still there"])
    assert second.receive() == (0, ["still there"])
    assert left == []
    first.close()


def test_a_peer_that_is_stuck_ends_this_one(
    monkeypatch: pytest.MonkeyPatch, left: list[str]
) -> None:
    monkeypatch.setattr(ranks_module, "SILENCE_S", 0.3)
    ours, theirs = kit.tcp_pair()
    Ranks(PLACE, [Line(ours, 1)], left.append)
    wait_for(lambda: left)
    assert left == ["error: rank 1 has not answered for 0.3 s: rank 0 ends, too\n"]
    theirs.close()


@pytest.mark.parametrize("sent", [b"\xff\xff\xff\xff", b"\0\0\0\x03{x}"])
def test_noise_on_a_line_ends_it(sent: bytes, left: list[str]) -> None:
    ours, theirs = kit.tcp_pair()
    Ranks(PLACE, [Line(ours, 1)], left.append)
    theirs.sendall(sent)
    wait_for(lambda: left)
    assert left[0].startswith("error: rank 1 sends what cannot be read")
    theirs.close()


def test_a_test_waits_for_no_rank_once_another_has_failed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(kit, "GRACE_S", 0.1)
    launch = kit.Launch(tmp_path / "ranks", kit.one_fails, [60.0], [60.0])
    with pytest.raises(AssertionError, match="rank 0 fails"):
        launch.wait_for("slept")
    assert launch.codes() == [1, None]
    assert not (tmp_path / "ranks" / "slept").exists()


def _join_both(theirs: About, store: _Store | None = None) -> list[Any]:
    """Joins rank 0 and rank 1, in threads; returns what each got, or its error."""
    store, found = store or _Store(), [None, None]

    def one(rank: int, about: About) -> None:
        try:
            found[rank] = join(Place(rank, rank, 2, True), store, about, {"checked": True})
        except Exception as error:
            found[rank] = error

    threads = [threading.Thread(target=one, args=each) for each in ((0, ABOUT), (1, theirs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(kit.PATIENCE_S)
    return found


def test_ranks_that_are_alike_join_and_hear_what_rank_0_decides() -> None:
    (first, told), (second, heard) = _join_both(ABOUT._replace(folder="/elsewhere"))
    assert told == heard == {"checked": True}
    first.send(["open", 1])
    assert second.receive() == (0, ["open", 1])
    first.close()


def test_ranks_that_differ_do_not_join() -> None:
    other = ABOUT._replace(folder="/b", model={**ABOUT.model, "the weights": "3"})
    for error in _join_both(other):
        assert isinstance(error, ModelError)
        assert str(error).endswith("the weights in /b and in /model differ")
    for error in _join_both(ABOUT._replace(options={"capacity": 8})):
        assert isinstance(error, ArgumentError)
        assert "started with capacity 8, rank 0 with 64" in str(error)


def test_nobody_joins_without_the_secret() -> None:
    intruders: list[Line] = []

    class Spied(_Store):
        def set(self, key: str, value: str, /) -> None:
            host, port, _ = json.loads(value)
            for hello in (["", 1, ABOUT._asdict()], "x", None):
                line = Line(socket.create_connection((host, port)))
                if hello is not None:
                    line.send(hello)
                    intruders.append(line)
                else:
                    line.close()
            super().set(key, value)

    (first, _), (second, _) = _join_both(ABOUT, Spied())
    assert isinstance(second, Ranks)
    first.close()
    for line in intruders:
        line.close()


def test_a_rank_that_does_not_come_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks_module, "JOIN_S", 0.2)
    with pytest.raises(ParallelError, match="cannot join the others: rank 1 did not come in 0.2 s"):
        join(PLACE, _Store(), ABOUT)


def test_what_is_wrong_with_a_call_is_found_before_anybody_hears_of_it() -> None:
    backend = kit.mirrored(tiny_llama())
    row = backend.open()
    with pytest.raises(CapacityError):
        backend.extend([Nodes(row, [1] * 300)])
    with pytest.raises(ArgumentError):
        backend.extend([Nodes(row, [1], [5])])
    with pytest.raises(ArgumentError):
        backend.commit([AcceptedPath(row, [3])])
    with pytest.raises(ArgumentError):
        backend.truncate(row, 2)
    with pytest.raises(ArgumentError):
        backend.release(row + 1)
    backend.extend([Nodes(row, [1, 2])])  # and all are still level
    backend.close()


def test_a_forward_that_fails_ends_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks_module, "_SETTLE_S", 0.1)
    backend = kit.mirrored(tiny_llama())
    row = backend.open()

    def broken(*_: Any, **__: Any) -> None:
        raise MemoryError("no more of it\nat all")

    monkeypatch.setattr(backend._part, "_forward", broken)
    for _ in range(2):
        with pytest.raises(ParallelError, match="rank 0 failed at forward 1: MemoryError: no more"):
            backend.extend([Nodes(row, [1])])


def test_a_closed_model_says_so() -> None:
    backend = kit.mirrored(tiny_llama())
    backend.close()
    backend.close()
    with pytest.raises(ParallelError, match="was closed"):
        backend.open()


def test_ctrl_c_waits_until_all_ranks_have_done_the_call() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt):
        with parallel._undisturbed():
            os.kill(os.getpid(), signal.SIGINT)
            done.append(1)
    assert done == [1]


@pytest.mark.parametrize("command", [["generate", "Tom"], ["chat"], ["serve"]])
def test_the_commands_say_how_to_start_them_in_parallel(
    command: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    said = Ran(*command, "--parallel", "tensor").error()
    assert "RANK is not set: start them with torchrun --nproc-per-node 2 -m redwood" in said


def _as_rank_0(monkeypatch: pytest.MonkeyPatch, size: str = "2") -> None:
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", size)):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "1")


@pytest.mark.parametrize(
    "options, said",
    [
        (["--parallel", "both"], "'both' must be one of tensor, pipeline"),
        (["--parallel", "tensor", "--backend", "native"], "not on native"),
        (["--parallel", "tensor", "--backend", "cuda_graph"], "not on cuda_graph"),
        (["--parallel", "tensor", "--weights", "int4"], "weights cannot go with parallel tensor"),
        (["--parallel", "pipeline", "--threads", "1"], "threads cannot go with parallel pipeline"),
        (["--parallel", "tensor", "--device", "cuda:0"], "gives every rank a GPU of its own"),
    ],
)
def test_options_that_cannot_go_together_are_refused(
    options: list[str], said: str, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _as_rank_0(monkeypatch)
    words = ["generate", "--raw", "Tom", "--target", str(tiny_model_folder)]
    assert said in Ran(*words, *options).error()


@pytest.mark.parametrize("size, said", [("1", "needs 2 processes or more"), ("x", "is no number")])
def test_a_launch_of_one_is_none(size: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _as_rank_0(monkeypatch, size)
    with pytest.raises(ArgumentError, match=said):
        find_place("tensor")


def test_every_rank_takes_the_gpu_of_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert str(_device("auto", Place(5, 1, 8, False))) == "cuda:1"
    with pytest.raises(ArgumentError, match="rank 2 needs a GPU of its own: this machine has 2"):
        _device("cuda", Place(2, 2, 4, True))
    with pytest.raises(ArgumentError, match="CUDA_VISIBLE_DEVICES"):
        _device("cpu", PLACE)
