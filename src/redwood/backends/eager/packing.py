"""Linear layers for a few rows at once on CPUs: weights packed once for oneDNN.

PyTorch's float32 `linear` goes through MKL, which packs the weights anew on every call of 2 to 64
rows: SmolLM2's linear layers then take 80 to 90 ms where one row takes 40 (2 cores, AVX2). Packed
ahead they take 33 to 62 ms, and a tree pays.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor, nn

_PACKED_FOR_ROWS = 16


class PackedLinear(nn.Module):
    """Stands for an `nn.Linear` in float32 on the CPU; the original weight is not kept."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach()
        self.out_features, self.in_features = weight.shape
        self.bias = linear.bias
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight, _PACKED_FOR_ROWS)

    @cached_property
    def weight(self) -> Tensor:
        """The weight [out_features, in_features], unpacked: for modules that look at it."""
        weight: Tensor = self._packed.to_dense()
        return weight

    def forward(self, rows: Tensor) -> Tensor:
        """Returns rows [..., in_features] times the weight, plus bias: [..., out_features]."""
        result: Tensor = torch.ops.mkldnn._linear_pointwise(
            rows, self._packed, self.bias, "none", [], ""
        )
        return result


def pack_linears(model: nn.Module) -> int:
    """Replaces the float32 linear layers of `model` on the CPU; returns how many.

    Does nothing where this build of PyTorch has no oneDNN. The embedding that shares its weight
    with the output layer is not touched.
    """
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return 0
    found = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if type(child) is nn.Linear
        and child.weight.device.type == "cpu"
        and child.weight.dtype == torch.float32
    ]
    for parent, name, child in found:
        setattr(parent, name, PackedLinear(child))
    return len(found)
