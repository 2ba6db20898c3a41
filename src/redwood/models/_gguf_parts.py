"""A model in GGUF files: one, or the parts that llama.cpp's splitting tool makes.

Parts are called NAME-00001-of-0000N.gguf and are in one folder. The first holds the metadata; every
part says which of how many it is. Any of them names the model. `check_language_model` says what a
GGUF file contains that is no language model.
"""

from __future__ import annotations

import hashlib
import re
import struct
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from redwood.errors import ModelError
from redwood.models._gguf import GGUFFile, Tensor, Value

_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})(\.gguf)", re.IGNORECASE)
_EMBEDDING = "token_embd.weight"
_TYPES = {
    "adapter": "a LoRA adapter",
    "mmproj": "the image or audio encoder of a model (mmproj)",
    "imatrix": "an importance matrix for quantising",
}
_OTHERS = {
    "clip": _TYPES["mmproj"],
    "imatrix": _TYPES["imatrix"],
    "controlvector": "a control vector",
}


def gguf_parts(path: Path) -> list[Path]:
    """Returns the files of the model that `path` is, or is a part of, in order.

    Raises: ModelError if it is a part and another one is missing, or has the name of another count.
    """
    if _PART.fullmatch(path.name) is None:
        return [path]  # not read: a part of another name is refused when it is opened
    with GGUFFile(path) as file:
        return _parts_of(file)


def _parts_of(file: GGUFFile) -> list[Path]:
    path, count = file.path, _split(file, "count")
    if count <= 1:
        return [path]
    named = _PART.fullmatch(path.name)
    if named is None or int(named[3]) != count:
        raise ModelError(
            f"{path} is one of {count} parts, so its name must end in -00001-of-{count:05d}.gguf; "
            "rename the parts as they were"
        )
    stem, _, total, suffix = named.groups()
    parts = [path.with_name(f"{stem}-{n:05d}-of-{total}{suffix}") for n in range(1, count + 1)]
    for part in parts:
        if not part.is_file():
            raise ModelError(f"{path} is one of {count} parts, and {part} is missing")
    return parts


class GGUFModel:
    """A model's GGUF files, open as one; a context manager.

    Args:
        path: the file, or any part.

    Raises:
        ModelError: as `GGUFFile` and `gguf_parts`; parts that contradict each other.

    Attributes: `path` and `metadata` of the first part, `tensors` of all (offsets count in the file
    that holds the tensor), `parts` the files.
    """

    def __init__(self, path: Path) -> None:
        with ExitStack() as stack:
            given = stack.enter_context(GGUFFile(path))
            self.parts = _parts_of(given)
            self.path = self.parts[0]
            self._files = [
                given if part == path else stack.enter_context(GGUFFile(part))
                for part in self.parts
            ]
            self.tensors: dict[str, Tensor] = {}
            self._holders: dict[str, GGUFFile] = {}
            if len(self._files) > 1:
                self._check_parts()
            for file in self._files:
                self._add(file)
            self._check_number()
            self._stack = stack.pop_all()

    @property
    def metadata(self) -> Mapping[str, Value]:
        """Key to value, of the first part."""
        return self._files[0].metadata

    def data(self, name: str) -> NDArray[np.uint8]:
        """Returns the bytes of a tensor; see `GGUFFile.data`."""
        return self._holders.get(name, self._files[0]).data(name)

    def forget(self) -> None:
        """Gives back the memory of pages read so far, where the system can."""
        for file in self._files:
            file.forget()

    def close(self) -> None:
        """Unmaps the files; see `GGUFFile.close`."""
        self._stack.close()

    def __enter__(self) -> GGUFModel:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _check_parts(self) -> None:
        count = len(self._files)
        said = _split(self._files[0], "tensors.count")
        totals = {_split(file, "tensors.count", said) for file in self._files}
        for index, file in enumerate(self._files):
            if _split(file, "count") != count:
                raise ModelError(
                    f"{file.path} says split.count {_split(file, 'count')}, not {count}"
                )
            if _split(file, "no") != index:
                raise ModelError(f"{file.path} says split.no {_split(file, 'no')}, not {index}")
            architecture = file.metadata.get("general.architecture")
            if architecture not in (None, "", self.metadata.get("general.architecture")):
                raise ModelError(f"{file.path} is of another model: architecture {architecture!r}")
        if len(totals) > 1:
            listed = ", ".join(map(str, sorted(totals)))
            raise ModelError(f"the parts of {self.path} disagree: split.tensors.count {listed}")

    def _add(self, file: GGUFFile) -> None:
        for name, tensor in file.tensors.items():
            if name in self._holders:
                raise ModelError(
                    f"the tensor {name!r} is in {self._holders[name].path} and in {file.path}"
                )
            self.tensors[name], self._holders[name] = tensor, file

    def _check_number(self) -> None:
        total = _split(self._files[0], "tensors.count", len(self.tensors))
        if len(self._files) > 1 and total != len(self.tensors):
            raise ModelError(
                f"the parts of {self.path} hold {len(self.tensors)} tensors, and say {total}"
            )


def check_language_model(file: GGUFFile | GGUFModel) -> None:
    """Raises ModelError, in one line, for a file that holds no causal language model.

    No backend could run it; what only one of them cannot run is not refused here.
    """
    metadata = file.metadata
    kind, architecture = metadata.get("general.type"), metadata.get("general.architecture")
    if "adapter.type" in metadata:
        kind = "adapter"
    held = None
    if kind not in (None, "", "model"):
        held = _TYPES.get(str(kind), f"of type {str(kind)[:40]!r}")
    elif architecture in _OTHERS:
        held = _OTHERS[str(architecture)]
    elif not file.tensors:
        held = "a vocabulary without weights"
    elif _EMBEDDING not in file.tensors:
        held = f"of architecture {str(architecture)[:40]!r} and has no tensor {_EMBEDDING}"
    if held is not None:
        advice = {"adapter": ": merge it into its base model first"}.get(str(kind), "")
        raise ModelError(f"{file.path} is {held}, not a language model{advice}")
    if metadata.get(f"{architecture}.attention.causal") is False:
        raise ModelError(
            f"{file.path} is of architecture {str(architecture)[:40]!r} whose attention is not "
            "causal: it does not write text from left to right"
        )


def merge(path: Path, target: Path, *, weights: bool) -> None:
    """Writes all parts of a model as one file, for libraries that read no parts.

    Args:
        path: any part.
        target: the new file.
        weights: False: a sparse file without the numbers, which takes no disk space for them.

    Raises: as `GGUFModel`; OSError.
    """
    from gguf import GGUFReader

    with GGUFModel(path) as model, target.open("wb") as out:
        reader = GGUFReader(model.path)
        fields = [
            b"".join(part.tobytes() for part in field.parts)
            for key, field in reader.fields.items()
            if not key.startswith(("GGUF.", "split."))
        ]
        alignment = int(reader.alignment)
        del reader
        out.write(struct.pack("<4sIQQ", b"GGUF", 3, len(model.tensors), len(fields)))
        out.writelines(fields)
        starts, end = _places(model, alignment)
        for name, tensor in model.tensors.items():
            out.write(_description(name, tensor, starts[name]))
        base = out.tell() + -out.tell() % alignment
        for name in model.tensors if weights else ():
            out.seek(base + starts[name])
            out.write(model.data(name).data)
            model.forget()
        out.truncate(base + end)


def _places(model: GGUFModel, alignment: int) -> tuple[dict[str, int], int]:
    """Where each tensor begins, counted from the first, and where the last ends."""
    starts, end = {}, 0
    for name, tensor in model.tensors.items():
        starts[name] = end
        end += tensor.size + -tensor.size % alignment
    return starts, end


def _description(name: str, tensor: Tensor, start: int) -> bytes:
    from gguf import GGMLQuantizationType

    raw = name.encode()
    extents = tensor.shape[::-1]
    return b"".join(
        (
            struct.pack("<Q", len(raw)),
            raw,
            struct.pack(f"<I{len(extents)}Q", len(extents), *extents),
            struct.pack("<IQ", GGMLQuantizationType[tensor.kind], start),
        )
    )


def _split(file: GGUFFile, name: str, default: int = 0) -> int:
    """A number of `split.`; a bool is none."""
    value = file.metadata.get(f"split.{name}", default)
    if type(value) is not int or value < 0:
        raise ModelError(f"{file.path} says split.{name} {str(value)[:40]!r}, which is no number")
    return value


def stamp_of(parts: list[Path]) -> tuple[int, int]:
    """Returns two numbers that change when a file does: bytes, and nanoseconds of its last change.

    Of several files the second number stands for the sizes and times of all.
    """
    known = [(path.stat().st_size, path.stat().st_mtime_ns) for path in parts]
    if len(known) == 1:
        return known[0]
    digest = hashlib.sha256(repr(known).encode()).hexdigest()
    return sum(size for size, _ in known), int(digest[:15], 16)
