"""Where a folder of safetensors keeps the experts that Transformers stacks when it loads them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

from torch import nn

_PLAIN = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
_MIXTRAL = {"gate_up_proj": ("w1", "w3"), "down_proj": ("w2",)}


def stored_name(name: str, stored: Collection[str]) -> str | None:
    """Returns the tensor of a parameter: its own name, or Mixtral's for the parts of an MLP."""
    other = name.replace(".mlp.", ".block_sparse_moe.")
    return next((each for each in (name, other) if each in stored), None)


def one_by_one(
    name: str, experts: nn.Module, count: int, stored: Collection[str]
) -> list[tuple[str, ...]] | None:
    """Returns the tensors of each expert in the stack `name`, rows of one behind the other's.

    None: the folder has not all of them, or the class stacks them in another way.
    """
    stem, _, part = name.rpartition(".experts.")
    if not getattr(experts, "is_concatenated", False) or getattr(experts, "is_transposed", True):
        return None
    for names in _ways(stem, part):
        listed = [tuple(each.format(e) for each in names) for e in range(count)]
        if all(each in stored for parts in listed for each in parts):
            return listed
    return None


def _ways(stem: str, part: str) -> Iterator[list[str]]:
    ways: tuple[tuple[str, Mapping[str, tuple[str, ...]]], ...] = (
        (stem, _PLAIN),
        (stem.removesuffix(".mlp") + ".block_sparse_moe", _MIXTRAL),
    )
    for prefix, parts in ways:
        if part in parts:
            yield [f"{prefix}.experts.{{}}.{each}.weight" for each in parts[part]]
