"""A mapped file that is cut short ends the process with a line that names it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fork_kit import forked, script
from redwood.models import mapping

PATIENCE_S = 120.0
_SAID = "was cut short, or can no longer be read, while it was in use: start again"


def run(code: str, *args: str, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *args],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        env={**os.environ, "PYTHONFAULTHANDLER": "", **more},
    )


_CUT = """
import os, sys
from redwood.models.mapping import mapped
with open(sys.argv[1], "rb") as file:
    data = mapped(file)
print(data[70000], flush=True)
os.truncate(sys.argv[1], 4096)
print(data[70000])
"""


def test_the_last_line_names_the_file(tmp_path: Path) -> None:
    file = tmp_path / "a name with spaces"
    file.write_bytes(bytes(100_000))
    ran = run(_CUT, str(file))
    assert (ran.returncode, ran.stdout) == (1, "0\n")
    assert ran.stderr == f"error: {file} {_SAID}\n"


def test_it_is_found_among_many_maps_and_from_any_thread(tmp_path: Path) -> None:
    file = tmp_path / "f"
    file.write_bytes(bytes(100_000))
    many = "import mmap, threading\nheld = [mmap.mmap(-1, 4096 * (1 + i % 3)) for i in range(3000)]"
    code = _CUT.replace(
        "print(data[70000])\n",
        "t = threading.Thread(target=lambda: data[70000])\nt.start()\nt.join()",
    )
    ran = run(f"{many}\n{code}", str(file))
    assert ran.returncode == 1 and ran.stderr == f"error: {file} {_SAID}\n"


def test_a_handler_of_somebody_else_gets_its_turn(tmp_path: Path) -> None:
    file = tmp_path / "f"
    file.write_bytes(bytes(100_000))
    ran = run(f"import faulthandler\nfaulthandler.enable()\n{_CUT}", str(file))
    assert ran.returncode == -signal.SIGBUS
    assert ran.stderr.startswith(f"error: {file} {_SAID}\n") and "Bus error" in ran.stderr


def test_a_bus_error_that_no_file_explains_is_left_alone() -> None:
    code = "import os, signal\nfrom redwood.models.mapping import *\nexplain_bus_errors()\n"
    ran = run(
        code + "explain_bus_errors()\nos.kill(os.getpid(), signal.SIGBUS)\nimport time\n"
        "os.kill(os.getpid(), signal.SIGBUS)"
    )
    assert (ran.returncode, ran.stderr) == (-signal.SIGBUS, "")


_LOADED = """
import os, sys, redwood
from redwood.backends.native import load as native_load
native_load._IN_MEMORY = 0  # also a tiny model's weights are mapped
engine = redwood.load(sys.argv[1], backend="native", threads=1)
print(engine.generate("Tom", max_tokens=2).finish_reason, flush=True)
held = [line.split(None, 5)[5].strip() for line in open("/proc/self/maps") if "/packed/" in line]
os.truncate(held[0], 0)
print(held[0], flush=True)
engine.generate("Tom went to the market", max_tokens=2)
"""


def test_packed_weights_that_are_cut_are_named_and_made_again(
    tiny_model_folder: Path, tmp_path: Path
) -> None:
    for _ in range(2):  # the second start finds the file damaged, and makes it again
        env = {"PYTHONFAULTHANDLER": "", "XDG_CACHE_HOME": str(tmp_path)}
        ran = forked(script, _LOADED, str(tiny_model_folder), env={**os.environ, **env})
        path = ran.stdout.splitlines()[-1]
        assert ran.returncode == 1 and path.startswith(str(tmp_path)), ran.stderr
        assert ran.stderr.splitlines()[-1] == f"error: {path} {_SAID}"


def test_where_the_extension_is_older_files_are_mapped_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mapping, "_native", None)
    (tmp_path / "f").write_bytes(b"abc")
    with (tmp_path / "f").open("rb") as file:
        assert mapping.mapped(file)[1:] == b"bc"


def test_files_are_mapped_in_one_place() -> None:
    source = Path(mapping.__file__).parent
    found = {
        file.name
        for file in source.rglob("*.py")
        if re.search(r"memmap\(|mmap\.mmap\((?!-1)", file.read_text())
    }
    assert found == {"mapping.py"}
