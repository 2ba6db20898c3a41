"""What the cache holds: listed, checked and removed by the names that `redwood models` shows."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from redwood.errors import ModelError
from redwood.models import _cache, _entries
from redwood.models._catalogue import PACKAGED, PackagedModel, suggestion

State = Literal["ready", "downloaded", "damaged", "absent"]


@dataclass(frozen=True)
class Installed:
    """One line of `redwood models list`.

    state is "ready", "downloaded" (the GGUF only, never used so far), "damaged" or "absent"
    (packaged, and not fetched so far); path is the folder with the tokenizer, where it is or will
    be, or the one with packed weights; source is what it was made from: packages or a path.
    """

    name: str
    state: State
    size_bytes: int
    path: Path
    source: str


def installed() -> list[Installed]:
    """Returns all packaged models, fetched or not, then the user's GGUF files that were used, then
    the packed weights of folders.
    """
    return [
        *(_packaged(model) for model in PACKAGED.values()),
        *(_users(name) for name in _entries.user_keys() + _entries.orphans()),
    ]


def remove(name: str) -> int:
    """Deletes what the cache holds for a name shown by `installed`; returns the bytes freed.

    Raises: ModelError if the cache could hold nothing by that name, or something cannot be deleted.
    """
    keys = (_entries.GGUF_KEY, _entries.PACKED_KEY)
    if name not in PACKAGED and not any(key.fullmatch(name) for key in keys):
        raise ModelError(
            f"cannot remove {name!r}{suggestion(name)}: give a name from `redwood models list`"
        )
    folders = [entry.folder for entry in _entries.all_of(name)]
    freed = sum(_cache.size_on_disk(folder) for folder in folders)
    with _cache.lock(name), _cache.workspace(name, 0) as work:
        for number, folder in enumerate(folders):
            if folder.exists():  # gone for everyone at once, then deleted with the workspace
                folder.rename(work / str(number))
    return freed


def verify(name: str) -> None:
    """Reads every stored file of a model shown by `installed` and compares its sha256.

    Raises: ModelError, naming the file and the remedy, at the first that differs.
    """
    record = next((record for record in installed() if record.name == name), None)
    if record is None or record.state == "absent":
        raise ModelError(
            f"cannot verify {name!r}{suggestion(name)}: it is not in the cache, see "
            "`redwood models list`"
        )
    if fault := _entries.fault_of(name, deep=True):
        raise _entries.damaged(name, fault)


def _packaged(model: PackagedModel) -> Installed:
    name, state = model.name, _state(model.name)
    usable = _entries.converted(name).exists or _entries.described(name).exists
    if state == "ready" and not usable:
        state = "downloaded"
    return Installed(name, state, _size_bytes(name), _path(name), model.source)


def _users(name: str) -> Installed:
    return Installed(name, _state(name), _size_bytes(name), _path(name), _entries.source_of(name))


def _state(name: str) -> State:
    if not _entries.all_of(name):
        return "absent"
    return "damaged" if _entries.fault_of(name) else "ready"


def _size_bytes(name: str) -> int:
    return sum(_cache.size_on_disk(entry.folder) for entry in _entries.all_of(name))


def _path(name: str) -> Path:
    for entry in (_entries.converted(name), _entries.described(name), *_entries.packed(name)):
        if entry.exists and (entry.folder.name == name):
            return entry.folder
    return _entries.converted(name).folder
