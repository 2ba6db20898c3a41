"""What the cache holds for a model: its GGUF file, its conversions, its packed weights.

A model is known by its packaged name, or by `gguf-` and the first digits of the sha256 of a user's
file. Packed weights of a folder belong to no such name: they are known by their own, `packed-...`.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from redwood.errors import ModelError
from redwood.models import _cache, _convert, _packed
from redwood.models._catalogue import PACKAGED

GGUF_KEY = re.compile(r"gguf-[0-9a-f]{16}")
PACKED_KEY = re.compile(r"packed-[0-9a-f]{16}")

_USERS_DTYPE = "float32"
_PACKED_ORIGINAL = "gguf"


@dataclass(frozen=True)
class Entry:
    """A folder of the cache, and what it must have been made from.

    Attributes: `source_sha256` and `dtype` as in the manifest; None: not checked.
    """

    folder: Path
    dtype: str | None = None
    source_sha256: str | None = None

    @property
    def exists(self) -> bool:
        """Whether the folder is there, intact or not."""
        return self.folder.exists()

    def fault(self, deep: bool = False) -> str | None:
        """Returns what is wrong with the entry, or None; see `_cache.problem`."""
        known = _cache.read_manifest(self.folder)
        sha256, dtype = self.source_sha256, self.dtype
        if sha256 is None:
            sha256 = known.source_sha256 if known else ""
        if dtype is None:
            dtype = known.dtype if known else ""
        return _cache.problem(self.folder, source_sha256=sha256, dtype=dtype, deep=deep)

    def outdated(self) -> str | None:
        """Returns why what was made from a GGUF file must be made again, or None.

        Other code, or another version of Transformers, made it.
        """
        known = _cache.read_manifest(self.folder)
        if known is None or known.made_by == _convert.makers():
            return None
        return f"{self.folder} was made by another version of Redwood or Transformers"


def converted(name: str) -> Entry:
    """Returns the entry with safetensors, tokenizer and configuration."""
    dtype = PACKAGED[name].dtype if name in PACKAGED else _USERS_DTYPE
    return Entry(_cache.cache_dir() / "converted" / name, dtype, _sha256(name))


def described(name: str) -> Entry:
    """Returns the entry with tokenizer and configuration alone."""
    return Entry(_cache.cache_dir() / "described" / name, _convert.NO_WEIGHTS, _sha256(name))


def gguf(name: str) -> Entry:
    """Returns the entry with a packaged model's GGUF file."""
    return Entry(_cache.cache_dir() / "gguf" / name, _PACKED_ORIGINAL, _sha256(name))


def packed(name: str) -> list[Entry]:
    """Returns the entries with weights packed for this model, or the one of this name."""
    return [Entry(folder) for folder, owner in _packed_owners() if name in (owner, folder.name)]


def all_of(name: str) -> list[Entry]:
    """Returns all that the cache holds for a name, GGUF last but for what was packed from it."""
    made = [converted(name), described(name), gguf(name), *packed(name)]
    return [entry for entry in made if entry.exists]


def fault_of(name: str, deep: bool = False) -> str | None:
    """Returns the first thing that is wrong with what the cache holds for a name, or None."""
    held = all_of(name)
    if not PACKED_KEY.fullmatch(name) and held and not converted(name).exists:
        # The rest is of no use without this: it is missing if it is not among them.
        needed = gguf(name) if name in PACKAGED else described(name)
        held += [needed] if not needed.exists else []
    return next((found for entry in held if (found := entry.fault(deep))), None)


def user_keys() -> list[str]:
    """Returns the names of users' GGUF files of which the cache holds anything."""
    folders = [
        folder.name
        for kind in ("converted", "described")
        for folder in (_cache.cache_dir() / kind).glob("gguf-*")
    ]
    owners = [owner for _, owner in _packed_owners()]
    return sorted({name for name in folders + owners if GGUF_KEY.fullmatch(name)})


def orphans() -> list[str]:
    """Returns the names of packed weights that belong to a folder, or to nothing known."""
    return [
        folder.name
        for folder, owner in _packed_owners()
        if PACKED_KEY.fullmatch(folder.name)
        and owner not in PACKAGED
        and not GGUF_KEY.fullmatch(owner)
    ]


def source_of(name: str) -> str:
    """Returns what a user's model was made from, as its manifests say."""
    for entry in all_of(name):
        known = _cache.read_manifest(entry.folder)
        if known is not None:
            return known.name if PACKED_KEY.fullmatch(name) else known.source
    return "unknown"


def damaged(name: str, fault: str) -> ModelError:
    """Returns the error that tells what to do about a fault."""
    remedy = f"run `redwood models remove {name}`"
    if PACKED_KEY.fullmatch(name):
        remedy += "; the next use of the model packs it again"
    else:
        remedy += (
            f" and then `redwood models fetch {name if name in PACKAGED else source_of(name)}`"
        )
    return ModelError(f"the stored model {name} is damaged: {fault}; {remedy}")


def _packed_owners() -> list[tuple[Path, str]]:
    found = []
    for folder in _packed.folders():
        known = _cache.read_manifest(folder)
        found.append((folder, known.name if known else ""))
    return found


def _sha256(name: str) -> str | None:
    return PACKAGED[name].sha256 if name in PACKAGED else None
