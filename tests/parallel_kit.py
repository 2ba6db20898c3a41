"""What the tests of parallel models share: ranks as processes, and what they do.

The ranks of a test are forked from one process that has imported everything once: an import of
torch and Transformers takes longer than all that these tests compute.
"""

from __future__ import annotations

import atexit
import json
import multiprocessing
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from multiprocessing import forkserver
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import pytest

import redwood
from redwood.backends import load as _load  # noqa: F401
from redwood.backends.base import AcceptedPath
from redwood.backends.eager.backend import EagerBackend
from redwood.backends.load import wrap_model
from redwood.backends.parallel.backend import Member, ParallelBackend, follow
from redwood.backends.parallel.ranks import PARALLEL, Line, Place, Ranks
from redwood.engine.load import load as _whole  # noqa: F401
from redwood.errors import UnsupportedError
from redwood.models._transformers import split_options

PATIENCE_S = 120.0  # a loaded machine is slow
GRACE_S = 25.0  # for the others, once one has failed: a rank ends within 15 s of its peer's end


def need_parallel_loading() -> None:
    """Skips a module of tests where Transformers cannot load parts of a model."""
    try:
        for parallel in PARALLEL:
            split_options(parallel, 2)
    except UnsupportedError as error:
        pytest.skip(str(error), allow_module_level=True)


class Launch:
    """Processes that stand for what torchrun starts.

    Args:
        folder: for what they write.
        task: what each of them does, a function of this module; what it returns, JSON can hold.
        given: arguments, of each rank.
    """

    def __init__(
        self, folder: Path, task: Callable[..., Any], *given: Sequence[Any], **env: str
    ) -> None:
        context = fork_server()
        folder.mkdir()
        self.folder, port = folder, _free_port()
        self.processes = [
            context.Process(
                target=_run, args=(rank, len(given), port, folder, env, task, each), daemon=True
            )
            for rank, each in enumerate(given)
        ]
        for process in self.processes:
            process.start()

    def codes(self) -> list[int | None]:
        """Waits for the ends of all; returns the exit codes, None of one that did not end.

        Once a rank has failed, the others have `GRACE_S`: they may be waiting for it.
        """
        deadline, failed = time.monotonic() + PATIENCE_S, False
        while running := [process for process in self.processes if process.exitcode is None]:
            if not failed and self._failed():
                failed, deadline = True, min(deadline, time.monotonic() + GRACE_S)
            left = deadline - time.monotonic()
            if left <= 0 or not wait([process.sentinel for process in running], left):
                break
        codes = [process.exitcode for process in self.processes]
        for process in self.processes:
            process.kill()
        return codes

    def _failed(self) -> bool:
        return any(process.exitcode not in (None, 0) for process in self.processes)

    def results(self) -> list[Any]:
        """What the ranks returned, once all have ended well; None of a follower."""
        assert self.codes() == [0] * len(self.processes), self.errors()
        files = [self.folder / f"{rank}.json" for rank in range(len(self.processes))]
        return [json.loads(file.read_text()) if file.exists() else None for file in files]

    def errors(self) -> list[str]:
        """What the ranks wrote to stderr."""
        return [(self.folder / f"{r}.err").read_text() for r in range(len(self.processes))]

    def output(self) -> list[str]:
        """What the ranks wrote to stdout."""
        return [(self.folder / f"{r}.out").read_text() for r in range(len(self.processes))]

    def wait_for(self, name: str) -> None:
        """Waits until a rank has written to a file of this name; a rank that fails ends that."""
        deadline, file = time.monotonic() + PATIENCE_S, self.folder / name
        while not file.exists() or not file.stat().st_size:
            assert time.monotonic() < deadline and not self._failed(), self.errors()
            time.sleep(0.01)


def fork_server() -> Any:
    """The context of a process that has imported everything once, which is started here."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["parallel_kit", "fork_kit"])
    before = os.environ.get("PYTHONPATH")
    # NOTE: Python 3.11 imports what is to be preloaded without the path of this process.
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [str(Path(__file__).parent), *filter(None, [before])]
    )
    try:
        forkserver.ensure_running()
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before
    return context


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _run(
    rank: int, size: int, port: int, folder: Path, env: dict[str, str], task: Any, given: Any
) -> None:
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / f"{rank}.{name}", os.O_WRONLY | os.O_CREAT), number)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
    os.environ.update(
        env,
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(size),
        LOCAL_WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        FOLDER=str(folder),
    )
    try:
        result = task(*given)
        (folder / f"{rank}.json").write_text(json.dumps(result))
    finally:
        atexit._run_exitfuncs()  # multiprocessing ends its processes without them
        sys.stdout.flush()
        sys.stderr.flush()


def answers(cases: Sequence[dict[str, Any]], refused: bool = False) -> list[Any]:
    """Loads one engine after the other and returns the tokens of each; of followers nothing.

    Args:
        refused: errors are what is looked for; they stand in the place of tokens.
    """
    found = []
    for case in cases:
        try:
            engine = redwood.load(**case["load"])
        except SystemExit as ended:
            assert ended.code == 0
            continue
        except redwood.RedwoodError as error:
            if not refused:
                raise  # the other ranks may be gone, and the next case would wait for them
            found.append(f"{type(error).__name__}: {error}")
            continue
        told = [engine.generate(case["prompts"], **params) for params in case["params"]]
        found.append([[each.token_ids for each in outputs] for outputs in told])
        found.append(max(each.stats.mean_acceptance_length for o in told for each in o))
        if isinstance(engine.target, ParallelBackend):
            engine.target.close()
    return found


def endless(parallel: str, target: str, drop_commits: bool = False) -> None:
    """Answers until something ends it."""
    if drop_commits:
        _forget_a_commit()
    engine = redwood.load(target, "ngram", parallel=parallel, budget=8)
    while True:
        engine.generate([[5, 6, 7]], max_tokens=50, temperature=1.0)
        (Path(os.environ["FOLDER"]) / "answering").write_text("yes")


def _forget_a_commit() -> None:
    """From its fifth on, this rank keeps one token less than it is told to."""
    commit, calls = EagerBackend.commit, list[int]()

    def forgetful(self: EagerBackend, rows: Sequence[AcceptedPath]) -> None:
        calls.append(1)
        commit(self, [AcceptedPath(k.row, k.nodes[:-1]) if len(calls) > 8 else k for k in rows])

    EagerBackend.commit = forgetful  # type: ignore[method-assign]


def one_fails(others_sleep_s: float) -> None:
    """Rank 0 fails at once; the others wait for nobody, and then write that they did."""
    if os.environ["RANK"] == "0":
        raise RuntimeError("rank 0 fails")
    time.sleep(others_sleep_s)
    (Path(os.environ["FOLDER"]) / "slept").write_text("yes")


def command(*words: str) -> None:
    """Runs the command line."""
    from redwood.cli import main

    sys.argv = ["redwood", *words]
    main()


def pair(leave: Callable[[str], None]) -> tuple[Ranks, Ranks]:
    """Both ends of a line in one process; `leave` takes what would end a process."""
    ours, theirs = tcp_pair()
    return (
        Ranks(Place(0, 0, 2, True), [Line(ours, 1)], leave),
        Ranks(Place(1, 1, 2, True), [Line(theirs, 0)], leave),
    )


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ours = socket.create_connection(listener.getsockname())
        return ours, listener.accept()[0]


def mirrored(model: Any) -> ParallelBackend:
    """A driver and a follower that have the whole model each, in one process, checked."""
    driver, follower = pair(lambda text: None)
    threading.Thread(
        target=follow,
        args=(Member(wrap_model(model), checked=True), follower),
        kwargs={"checked": True},
        daemon=True,
    ).start()
    return ParallelBackend(
        Member(wrap_model(model), checked=True), driver, "tensor_parallel", checked=True
    )
