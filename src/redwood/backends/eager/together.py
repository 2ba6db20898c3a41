"""The check at load of how rows may share a forward: by the model's behaviour, not by a list.

A module whose tokens meet elsewhere than in our attention may still be right for one row alone,
and wrong for several: rotary angles may follow the longest row of a forward, a layer may count on
a line of token ids being one text. So a small tree is scored between rows that stand at the far end
of the context, and must get what it gets alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from redwood.backends.base import Nodes
from redwood.backends.eager.backend import EagerBackend, Together

_PARENTS = [-1, 0, 0, 1, 2, 3]
_OTHER_ROW = 8  # tokens of the other row
# Largest difference of logits that is rounding, in units of their spread.
_ROUNDING = {torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 3e-1}
_QUANTISED = 3e-1  # rounding to 8 bits amplifies that of the sums before it


def together_of(backend: EagerBackend) -> Together:
    """Returns the cheapest way in which rows of this model do not see each other.

    Args:
        backend: to try it on; rows of its capacity are what may come.
    """
    limit = _ROUNDING.get(backend.model.dtype, 1e-3)
    if backend.quantised:
        limit = _QUANTISED
    alone = _tree_logits(backend, with_others=False)
    spread = float(alone.std()) or 1.0
    ways: list[Together] = ["flat", "padded"]
    for backend.together in ways:
        try:
            found = _tree_logits(backend, with_others=True)
        except Exception:  # a forward that cannot be done this way
            continue
        if float((found - alone).abs().max()) / spread <= limit:  # NaN is not
            return backend.together
    backend.together = "apart"
    return backend.together


def _tree_logits(backend: EagerBackend, *, with_others: bool) -> Tensor:
    """Logits [nodes, V] of a small tree, on the CPU: alone, or between two rows without logits."""
    tokens = [(7 * i + 1) % backend.vocab_size for i in range(len(_PARENTS) + _OTHER_ROW)]
    count = min(len(_PARENTS), backend.capacity)
    others = min(_OTHER_ROW, backend.capacity)
    added, first, tree = [Nodes(backend.open(), tokens[:count], _PARENTS[:count])], [0], 0
    for place in (0, 2) if with_others else ():
        added.insert(place, Nodes(backend.open(), tokens[-others:], num_logits=0))
        first.insert(place, backend.capacity - others)
        tree = 1
    try:
        for nodes, position in zip(added, first, strict=True):
            row = backend._row(nodes.row)
            row.parents, depths = row.grown(nodes, backend.capacity)
            row.depths = [position + depth for depth in depths]
        return backend._forward(added)[tree].float().cpu()
    finally:
        for nodes in added:
            backend.release(nodes.row)
