"""One model over several processes: rank 0 drives, the others follow.

Transformers splits the model (tensor or pipeline parallel); every process runs its part inside the
eager backend. Rank 0 is what the engine sees: drafting, chance and verification happen there and
nowhere else, so there is one tree, and nothing random to keep level. Before rank 0 does anything to
its rows it sends the same call to the others, which do it to theirs; inside a forward the parts
meet in Transformers' own collectives.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from redwood.backends.base import AcceptedPath, Nodes
from redwood.backends.eager.backend import EagerBackend
from redwood.backends.parallel.ranks import Ranks
from redwood.backends.rows import check_distinct
from redwood.errors import ArgumentError, ParallelError

Call = list[Any]
"""A verb of `Backend` and its arguments, as JSON holds them."""


class Member:
    """What every rank has: its part of the model, and how a call is done to it.

    Args:
        checked: keep what `seen` needs.
    """

    def __init__(self, part: EagerBackend, *, checked: bool = False) -> None:
        self.part = part
        self._texts: dict[int, list[int]] | None = {} if checked else None

    def do(self, call: Call) -> list[Tensor]:
        """Does a call; returns the logits of an "extend", else nothing.

        Raises:
            RedwoodError: see `Backend`.
            ParallelError: a new row has another number here than at rank 0.
        """
        verb, given = call[0], call[1:]
        logits: list[Tensor] = []
        if verb == "open":
            row = self.part.open()
            if row != given[0]:
                raise ParallelError(f"row {row} was opened where rank 0 opened {given[0]}")
        elif verb == "extend":
            logits = self.part.extend([Nodes(*nodes) for nodes in given[0]])
        elif verb == "commit":
            self.part.commit([AcceptedPath(*kept) for kept in given[0]])
        elif verb == "truncate":
            self.part.truncate(*given)
        elif verb == "release":
            self.part.release(*given)
        else:
            raise ParallelError(f"rank 0 sends {verb!r}, which is no call")
        if self._texts is not None:
            self._note(verb, given)
        return logits

    def _note(self, verb: str, given: Sequence[Any]) -> None:
        """Keeps the tokens of every row: the cache holds keys and values alone."""
        assert self._texts is not None
        if verb == "open":
            self._texts[given[0]] = []
        elif verb == "extend":
            for row, tokens, *_ in given[0]:
                self._texts[row] += tokens
        elif verb == "commit":
            for row, kept in given[0]:
                text, held = self._texts[row], self.part.length(row) - len(kept)
                self._texts[row] = text[:held] + [text[held + node] for node in kept]
        elif verb == "truncate":
            del self._texts[given[0]][given[1] :]
        else:
            del self._texts[given[0]]

    def seen(self, call: Call, logits: Sequence[Tensor]) -> dict[str, str]:
        """Returns digests of what this rank has after an "extend": the trees, and the logits.

        The trees are those of the rows in the call, with the text before them.
        """
        assert self._texts is not None
        trees = []
        for row, *_ in call[1]:
            state = self.part._row(row)
            trees.append([row, state.length, state.parents, state.depths, self._texts[row]])
        scores = hashlib.sha256()
        for each in logits:
            scores.update(each.detach().float().cpu().numpy().tobytes())
        tree = hashlib.sha256(json.dumps(trees).encode())
        return {"tree": tree.hexdigest(), "logits": scores.hexdigest()}


class ParallelBackend:
    """Rank 0's backend: every call goes to the other ranks as well.

    What is wrong with a call is found here, before anybody else hears of it. What goes wrong
    later, inside a forward, leaves the ranks at different places: it ends them all.

    Args:
        member: rank 0's part.
        ranks: connections to the other ranks, which end when this process does.
        name: "tensor_parallel" or "pipeline_parallel".
        checked: compare the tree and the logits of all ranks after every forward.
        then: called once at the end.
    """

    def __init__(
        self,
        member: Member,
        ranks: Ranks,
        name: str,
        *,
        checked: bool = False,
        then: Callable[[], None] = lambda: None,
    ) -> None:
        self.name = name
        self._member, self._part, self._ranks = member, member.part, ranks
        self._checked, self._then = checked, then
        self._steps = 0
        self._fault: ParallelError | None = None
        self._next_row = 0
        atexit.register(self.close)

    @property
    def model(self) -> Any:
        """Rank 0's part of the model."""
        return self._part.model

    @property
    def vocab_size(self) -> int:
        """Columns of the logits."""
        return self._part.vocab_size

    @property
    def capacity(self) -> int:
        """Slots of one row."""
        return self._part.capacity

    @property
    def device(self) -> torch.device:
        """Where logits come out."""
        return self._part.device

    def open(self) -> int:
        """Returns a new, empty row."""
        self._do(["open", self._next_row + 1])
        self._next_row += 1
        return self._next_row

    def length(self, row: int) -> int:
        """Returns the number of committed tokens."""
        return self._part.length(row)

    def extend(self, rows: Sequence[Nodes]) -> list[Tensor]:
        """Appends provisional nodes and scores them on all ranks; see `Backend.extend`.

        Raises:
            ParallelError: the forward failed, or ranks disagree.
        """
        check_distinct(rows)
        for nodes in rows:
            self._part._row(nodes.row).grown(nodes, self.capacity)
        return self._do(["extend", [_plain(nodes) for nodes in rows]])

    def commit(self, rows: Sequence[AcceptedPath]) -> None:
        """Keeps a path of provisional nodes per row; see `Backend.commit`."""
        for kept in rows:
            self._part._row(kept.row).check_path(kept)
        self._do(["commit", [[kept.row, [int(node) for node in kept.nodes]] for kept in rows]])

    def truncate(self, row: int, length: int) -> None:
        """Drops provisional nodes and committed tokens past `length`."""
        if not 0 <= length <= self.length(row):
            raise ArgumentError(f"truncate: length {length} is not in 0..{self.length(row)}")
        self._do(["truncate", row, int(length)])

    def release(self, row: int) -> None:
        """Forgets the row and frees its slots."""
        self._part._row(row)
        self._do(["release", row])

    def close(self) -> None:
        """Lets the other ranks end; called by itself when the process ends. Twice is fine."""
        atexit.unregister(self.close)
        if self._fault is None:
            self._fault = ParallelError("this model was closed, and the other ranks have ended")
            self._ranks.close()
            self._then()

    def _do(self, call: Call) -> list[Tensor]:
        with _undisturbed():
            if self._fault is not None:
                raise self._fault
            self._steps += call[0] == "extend"
            try:
                self._ranks.send(call)
                logits = self._member.do(call)
                if self._checked and call[0] == "extend":
                    self._compare(self._member.seen(call, logits))
            except Exception as error:
                self._ranks.settle()
                self._fault = _fault(0, self._steps, error)
                self._ranks.fail(str(self._fault))
                raise self._fault from error
            return logits

    def _compare(self, ours: dict[str, str]) -> None:
        for _ in range(self._ranks.place.size - 1):
            rank, (_, step, theirs) = self._ranks.receive()
            if step != self._steps:
                raise ParallelError(f"rank {rank} is at forward {step}, not {self._steps}")
            for what, digest in ours.items():
                if theirs[what] != digest:
                    raise ParallelError(f"rank {rank} has another {what} than rank 0")


def follow(member: Member, ranks: Ranks, *, checked: bool = False) -> None:
    """Repeats the calls of rank 0 until that ends.

    SIGINT and SIGTERM are for rank 0 to obey, in its own time: a launcher sends them to all.

    Raises:
        ParallelError: a call failed; the other ranks have been notified.
    """
    steps = 0
    with _deaf():
        while True:
            _, call = ranks.receive()
            if call == ["end"]:
                return
            steps += call[0] == "extend"
            try:
                logits = member.do(call)
                if checked and call[0] == "extend":
                    ranks.send(["seen", steps, member.seen(call, logits)])
            except Exception as error:
                ranks.settle()
                fault = _fault(ranks.place.rank, steps, error)
                ranks.fail(str(fault))
                raise fault from error


def _fault(rank: int, step: int, error: Exception) -> ParallelError:
    if isinstance(error, ParallelError):
        return ParallelError(f"the ranks are out of step at forward {step}: {error}")
    text = (str(error).strip().splitlines() or [""])[0][:300]
    return ParallelError(f"rank {rank} failed at forward {step}: {type(error).__name__}: {text}")


def _plain(nodes: Nodes) -> list[Any]:
    parents = None if nodes.parents is None else [int(parent) for parent in nodes.parents]
    return [nodes.row, [int(token) for token in nodes.token_ids], parents, nodes.num_logits]


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Holds Ctrl-C back: in the middle of a call it would leave the other ranks in a forward."""
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return
    came: list[tuple[Any, ...]] = []
    signal.signal(signal.SIGINT, lambda *signals: came.append(signals))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if came:
        before(*came[0])


@contextmanager
def _deaf() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    signals = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(each, signal.SIG_IGN) for each in signals]
    try:
        yield
    finally:
        for each, handler in zip(signals, before, strict=True):
            signal.signal(each, handler or signal.SIG_DFL)
