"""A stand-in for CUDA graphs that is as strict as one: a replay does operations, not Python.

Every operation is written down with the tensors it took. A replay does the same operations on the
same memory; a value that Python computed while recording stays what it was then. Reading a number
back from the device, which a capture does not allow, is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

_SYNCS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select")


class Tape(TorchDispatchMode):
    """A recording; as a recorder, pass the class itself."""

    def __init__(self, work: Callable[[], Tensor]) -> None:
        super().__init__()
        work()  # the warm-up
        self._steps: list[tuple[Any, Any, Any, Any]] = []
        with self:
            recorded = work()
        self._last = recorded
        self.output = recorded.clone()
        self.num_replays = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in _SYNCS:
            raise RuntimeError(f"{func} reads from the device: not permitted while capturing")
        made = func(*args, **(kwargs or {}))
        self._steps.append((func, args, kwargs or {}, made))
        return made

    def replay(self) -> None:
        """Does the recorded operations again."""
        self.num_replays += 1
        now: dict[int, Tensor] = {}

        def current(tensor: Tensor) -> Tensor:
            return now.get(id(tensor), tensor)

        for func, args, kwargs, made in self._steps:
            args, kwargs = tree_map_only(Tensor, current, (args, kwargs))
            again = func(*args, **kwargs)
            for old, new in zip(_tensors(made), _tensors(again), strict=True):
                now[id(old)] = new
        self.output.copy_(now[id(self._last)])


def _tensors(value: Any) -> list[Tensor]:
    parts = value if isinstance(value, tuple | list) else [value]
    return [part for part in parts if isinstance(part, Tensor)]
