"""Memory of models: what one will take, what it takes, how much all of them may.

Predicted are the weights, from the sizes of their files; measured is what the process grew by, and
at least the weights that are mapped. Keys and values are not counted here: they have a share of
what remains, see `Room.share`.
"""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from redwood.backends.offload.backend import resident_bytes
from redwood.drafters.base import draft_models
from redwood.engine.free_memory import free_bytes
from redwood.models import PACKAGED, gguf_parts, gguf_path, locate

if TYPE_CHECKING:
    from redwood.engine.text import Engine

SHARE = 0.5
"""Of the memory that is free at the start, for the weights of all models; the rest is for keys and
values."""
_BYTES = {"int4": 0.3, "int8": 0.55, "bf16": 1.0, "f32": 2.0, "float32": 2.0}
"""Against the 16 bits of a weight in safetensors."""


@dataclass(frozen=True)
class Room:
    """Memory for the weights of several models.

    Args:
        most: bytes that they may take together; None: no bound.
        count: of models.
        cuda: they are on a GPU.
    """

    most: int | None
    count: int
    cuda: bool = False

    def free(self) -> int | None:
        """Returns the bytes that are free where the models are; None where that is not known."""
        return free_on_gpu() if self.cuda else free_bytes()

    def held(self) -> int:
        """Returns the bytes that this process holds there."""
        if not self.cuda:
            return resident_bytes()
        import torch

        return int(torch.cuda.memory_reserved())

    def share(self, used: int, mapped: int = 0) -> float:
        """Returns the fraction of free memory for keys and values of one more model.

        Room that is kept for weights is no room for keys and values, and each of the models gets
        the same part of the rest.

        Args:
            used: bytes of all models that are loaded, this one included.
            mapped: of these, of the others, what is mapped from files, and so counts as free.
        """
        free = self.free()
        if not free:
            return 1.0 / self.count
        kept = 0 if self.most is None else max(0, self.most - used)
        return max(0, free - kept - (0 if self.cuda else mapped)) / free / self.count


def default_room(count: int, cuda: bool = False) -> Room:
    """Returns the room where the operator says nothing: half of what is free now."""
    free = Room(None, count, cuda).free()
    return Room(None if free is None else int(SHARE * free), count, cuda)


def free_on_gpu() -> int:
    """Returns the free bytes of the GPU that is used by default, PyTorch's own reserve included."""
    import torch

    free: int = torch.cuda.mem_get_info()[0]
    return free + int(torch.cuda.memory_reserved()) - int(torch.cuda.memory_allocated())


def predicted(
    names: Sequence[str], weights: str | None = None, dtype: str | None = None
) -> int | None:
    """Returns the bytes that the weights of a target and its draft models take, from their files.

    Args:
        names: the target, then models that draft.
        weights, dtype: of the target, as for `redwood.load`.

    Returns: None where the files of one of them are not here yet.

    Raises:
        ModelError: there is no such model.
    """
    total = 0
    for index, name in enumerate(names):
        size = _size(name)
        if size is None:
            return None
        factor = 1.0
        if index == 0 and gguf_path(name) is None:
            factor = _BYTES.get(str(weights), _BYTES.get(str(dtype), 1.0))
        total += int(factor * size)
    return total


def _size(name: str) -> int | None:
    found = gguf_path(name)
    if found is not None:
        return sum(part.stat().st_size for part in gguf_parts(found))
    if name in PACKAGED:
        return PACKAGED[name].size_bytes
    path = Path(name).expanduser()
    if not path.exists() and name.count("/") == 1 and not name.startswith((".", "/", "~")):
        return None  # on the hub, perhaps: what it takes is seen when it is loaded
    folder, _ = locate(name, progress=False)  # says what is wrong with a path
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def mapped_bytes(engine: Engine) -> int:
    """Returns the bytes of an engine's weights, its draft models' included, that are mapped from
    files: the system counts them as free."""
    backends: list[Any] = [engine.target, *(d.backend for d in draft_models(engine.drafter))]
    return sum(sum(getattr(each, "weight_bytes", {}).values()) for each in backends)


def give_back(cuda: bool = False) -> None:
    """Returns the memory of what is not used any more to the system."""
    gc.collect()
    if cuda:
        import torch

        torch.cuda.empty_cache()
    with suppress(OSError, AttributeError):  # glibc's alone
        ctypes.CDLL(None).malloc_trim(0)
