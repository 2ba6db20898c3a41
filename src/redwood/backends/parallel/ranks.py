"""What joins the processes of one model: a line from rank 0 to every other, watched from both ends.

Each line is a TCP connection of our own beside the process group. A group moves tensors, but waits
for a dead or stuck peer for minutes or hours, and must not be left waiting while nobody asks a
server anything. A line may be idle as long as it likes: both ends send a beat, and an end that
closes, or is silent, ends the process at the other.

Messages are JSON: nothing that a peer sends is executed. Every line begins with a secret that rank
0 leaves in the store of the launch, so that nobody else on the network can join.
"""

from __future__ import annotations

import hmac
import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from queue import SimpleQueue
from typing import Any, NamedTuple, NoReturn, Protocol

from redwood.errors import ArgumentError, ModelError, ParallelError

PARALLEL = ("tensor", "pipeline")
"""Ways to spread one model over processes."""

BEAT_S = 2.0
SILENCE_S = 15.0  # of a peer that is stuck: well below the 30 s in which all must have ended
JOIN_S = 300.0  # from the first rank to the last: one may still convert a model
_SETTLE_S = 2.0
_MOST_BYTES = 1 << 28
_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class Place(NamedTuple):
    """Which of how many processes this one is, as torchrun says."""

    rank: int
    local_rank: int
    size: int
    one_host: bool


class Store(Protocol):
    """The key-value store of a launch (`torch.distributed.Store`)."""

    def get(self, key: str, /) -> bytes:
        """Returns a value, waiting until it is there."""
        ...

    def set(self, key: str, value: str, /) -> None:
        """Leaves a value for others."""
        ...


def find_place(parallel: str) -> Place:
    """Returns the place of this process, from the variables that torchrun sets.

    Raises:
        ArgumentError: an unknown way, a process that torchrun did not start, a single process.
    """
    if parallel not in PARALLEL:
        raise ArgumentError(f"parallel {parallel!r} must be one of {', '.join(PARALLEL)}")
    start = "torchrun --nproc-per-node 2 -m redwood ..."
    missing = [name for name in _VARIABLES if not os.environ.get(name)]
    if missing:
        raise ArgumentError(
            f"parallel {parallel} needs several processes, and {missing[0]} is not set: "
            f"start them with {start}"
        )
    try:
        rank, local, size = (int(os.environ[name]) for name in _VARIABLES[:3])
        on_host = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    except ValueError as error:
        raise ArgumentError(f"RANK, LOCAL_RANK or WORLD_SIZE is no number: {error}") from error
    if size < 2:
        raise ArgumentError(f"parallel {parallel} needs 2 processes or more: start them, {start}")
    return Place(rank, local, size, on_host == size)


class Line:
    """One connection: whole messages, from any thread.

    Args:
        peer: the rank at the other end.
    """

    def __init__(self, connection: socket.socket, peer: int = -1) -> None:
        self.peer = peer
        self._socket, self._lock = connection, threading.Lock()
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.settimeout(SILENCE_S)

    def send(self, message: Any) -> None:
        """Sends a value that JSON can hold; OSError where that is not possible."""
        packed = json.dumps(message).encode()
        with self._lock:
            self._socket.sendall(len(packed).to_bytes(4, "big") + packed)

    def receive(self) -> Any:
        """Returns the next message.

        Raises:
            EOFError: the other end has closed.
            OSError, ValueError: it is silent for too long, or sends what is no message.
        """
        size = int.from_bytes(self._read(4), "big")
        if size > _MOST_BYTES:
            raise ValueError(f"a message of {size} bytes")
        return json.loads(self._read(size))

    def _read(self, size: int) -> bytes:
        parts = []
        while size:
            part = self._socket.recv(min(size, 1 << 20))
            if not part:
                raise EOFError
            parts.append(part)
            size -= len(part)
        return b"".join(parts)

    def hang_up(self) -> None:
        """Ends what is sent: the other end reads all of it, then that there is no more."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """Gives the connection back. NOTE: what was not read here would destroy what was sent."""
        self._socket.close()

    def wait_longer(self, seconds: float) -> None:
        """Sets how long `receive` waits for the next byte."""
        self._socket.settimeout(seconds)


class Ranks:
    """The lines of one process, each watched by a thread of its own.

    What ends a peer ends this process as well, within `SILENCE_S` and with one line on stderr: its
    main thread may be waiting inside a collective, which no exception can reach.

    Args:
        place: of this process.
        lines: of rank 0 to all others, of another rank to rank 0.
        leave: called with the line for stderr; None: writes it and ends the process with 1.
    """

    def __init__(
        self, place: Place, lines: list[Line], leave: Callable[[str], None] | None = None
    ) -> None:
        self.place = place
        self._lines, self._leave = lines, leave or _leave
        self._inbox: SimpleQueue[tuple[int, Any]] = SimpleQueue()
        self._lock, self._over = threading.Lock(), threading.Event()
        self._watches = [
            threading.Thread(target=self._watch, args=(line,), name="watch", daemon=True)
            for line in lines
        ]
        for thread in [*self._watches, threading.Thread(target=self._beat, daemon=True)]:
            thread.start()

    def send(self, message: Any) -> None:
        """Sends to all peers. One that cannot be reached is for the watch to find."""
        for line in self._lines:
            try:
                line.send(message)
            except OSError:
                self.settle()

    def receive(self) -> tuple[int, Any]:
        """Returns the next message and the rank it is from, however long that takes."""
        return self._inbox.get()

    def settle(self) -> None:
        """Waits a moment: what went wrong here may be the end of a peer, which the watch tells."""
        if self._over.wait(_SETTLE_S):
            time.sleep(2 * _SETTLE_S)  # it is ending this process

    def fail(self, reason: str) -> None:
        """Tells all peers why this process ends, which ends them, too; does nothing twice."""
        if self._end():
            self._tell(["fail", reason])

    def close(self) -> None:
        """Says goodbye: peers may end in peace."""
        if self._end():
            self._tell(["end"])

    def _end(self) -> bool:
        with self._lock:
            first = not self._over.is_set()
            self._over.set()
        return first

    def _tell(self, message: Any, but: int = -1) -> None:
        for line in self._lines:
            with suppress(OSError):
                if line.peer != but:
                    line.send(message)
            line.hang_up()
        deadline = time.monotonic() + _SETTLE_S
        for watch, line in zip(self._watches, self._lines, strict=True):
            if watch is not threading.current_thread() and line.peer != but:
                watch.join(max(0.0, deadline - time.monotonic()))

    def _beat(self) -> None:
        while not self._over.wait(BEAT_S):
            for line in self._lines:
                with suppress(OSError):  # its watch finds out
                    line.send(["beat"])

    def _watch(self, line: Line) -> None:
        try:
            self._read(line)
        except TimeoutError:
            self._lost(line, f"rank {line.peer} has not answered for {SILENCE_S:g} s")
        except (EOFError, OSError):
            self._lost(line, f"rank {line.peer} has ended without a word")
        except ValueError as error:
            self._lost(line, f"rank {line.peer} sends what cannot be read: {error}")
        line.close()

    def _read(self, line: Line) -> None:
        while True:
            message = line.receive()
            if message[0] == "fail":
                return self._lost(line, message[1])
            if message[0] == "end":
                self._end()
                self._inbox.put((line.peer, message))
                return line.hang_up()
            if message[0] != "beat" and not self._over.is_set():
                self._inbox.put((line.peer, message))

    def _lost(self, line: Line, reason: str) -> None:
        if self._end():
            self._tell(["fail", reason], but=line.peer)
            self._leave(f"error: {reason}: rank {self.place.rank} ends, too\n")


def _leave(text: str) -> NoReturn:
    with suppress(OSError, ValueError):  # nobody may read it any more
        os.write(sys.stderr.fileno(), text.encode())
    os._exit(1)


class About(NamedTuple):
    """What must be the same on all ranks.

    Args:
        folder: of the model, for the message.
        model: digests of its parts.
        options: how this process was started.
    """

    folder: str
    model: Mapping[str, str]
    options: Mapping[str, Any]


def join(place: Place, store: Store, about: About, shared: Any = None) -> tuple[Ranks, Any]:
    """Returns the lines of this process, once all processes have shown that they are alike.

    Args:
        shared: rank 0's settings, which are returned in every rank.

    Raises:
        ModelError: another rank has another model; on every rank.
        ArgumentError: another rank was started otherwise; on every rank.
        ParallelError: a rank does not come.
    """
    try:
        if place.rank == 0:
            lines, answer = _answer(place, store, about, shared)
        else:
            lines, answer = _call(place, store, about)
    except (OSError, EOFError, RuntimeError, ValueError) as error:  # RuntimeError: of the store
        raise ParallelError(
            f"rank {place.rank} cannot join the others: {str(error) or type(error).__name__}"
        ) from error
    if "shared" in answer:
        return Ranks(place, lines), answer["shared"]
    for line in lines:
        line.close()
    if "model" in answer:
        raise ModelError(answer["model"])
    raise ArgumentError(answer["options"])


def _call(place: Place, store: Store, about: About) -> tuple[list[Line], Any]:
    host, port, secret = json.loads(store.get("line"))
    line = Line(socket.create_connection((host, port), SILENCE_S), peer=0)
    line.send([secret, place.rank, about._asdict()])
    line.wait_longer(JOIN_S)
    answer = line.receive()
    line.wait_longer(SILENCE_S)
    return [line], answer


def _answer(place: Place, store: Store, about: About, shared: Any) -> tuple[list[Line], Any]:
    host = "127.0.0.1" if place.one_host else os.environ["MASTER_ADDR"]
    secret, deadline = secrets.token_hex(32), time.monotonic() + JOIN_S
    lines: dict[int, Line] = {}
    answer: dict[str, Any] = {}
    with ExitStack() as opened, socket.create_server((host, 0), family=_family(host)) as listener:
        store.set("line", json.dumps([host, listener.getsockname()[1], secret]))
        while len(lines) < place.size - 1:
            listener.settimeout(max(0.1, deadline - time.monotonic()))
            try:
                line = Line(listener.accept()[0])
            except TimeoutError:
                absent = sorted(set(range(1, place.size)) - set(lines))
                raise EOFError(f"rank {absent[0]} did not come in {JOIN_S:g} s") from None
            try:
                given, line.peer, theirs = line.receive()
                known = hmac.compare_digest(str(given), secret)
            except (EOFError, OSError, ValueError, TypeError):
                known = False
            if not known:
                line.close()
                continue
            lines[line.peer] = line
            opened.callback(line.close)
            answer = answer or _difference(line.peer, About(**theirs), about)
        opened.pop_all()
    for line in lines.values():
        line.send(answer or {"shared": shared})
    return list(lines.values()), answer or {"shared": shared}


def _difference(rank: int, theirs: About, ours: About) -> dict[str, str]:
    """Says in what a rank differs from rank 0, under the field's name; empty: in nothing."""
    for part, digest in ours.model.items():
        if theirs.model.get(part) != digest:
            return {
                "model": f"rank {rank} has another model than rank 0: {part} in {theirs.folder} "
                f"and in {ours.folder} differ"
            }
    for option, value in ours.options.items():
        if theirs.options.get(option) != value:
            return {
                "options": f"rank {rank} was started with {option} "
                f"{theirs.options.get(option)}, rank 0 with {value}"
            }
    return {}


def _family(host: str) -> socket.AddressFamily:
    return socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][0]
