"""The check at load that a module's tree logits are those of its paths."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from redwood._transformers import plain_logits
from redwood.backends.base import Kept, Nodes
from redwood.backends.eager import EagerBackend
from redwood.errors import UnsupportedError

_PROBE_PARENTS = [-1, 0, 0, 1, 2, 3]
_PROMPT = 8  # tokens before the probe tree
# Largest difference of logits, in units of their spread, between a tree and its paths.
_TOLERANCE = {torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 3e-1}

PROBE_SLOTS = _PROMPT + len(_PROBE_PARENTS)
"""Slots of a row that the check needs."""


def probe_tokens(model: PreTrainedModel) -> Tensor:
    """Returns random tokens, int64 [PROBE_SLOTS]: a prompt and a tree."""
    vocab_size = int(model.config.get_text_config().vocab_size)
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, vocab_size, (_PROMPT + len(_PROBE_PARENTS),), generator=generator)


def stock_logits(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """Returns logits [nodes, V] of the probe tree from the module as it came, path by path."""
    paths = []
    for leaf in sorted(set(range(len(_PROBE_PARENTS))) - set(_PROBE_PARENTS)):
        path = [leaf]
        while _PROBE_PARENTS[path[0]] >= 0:
            path.insert(0, _PROBE_PARENTS[path[0]])
        paths.append(path)
    longest = max(map(len, paths))
    # A shorter path is filled up behind its end, where nothing before it can see.
    places = [[*range(_PROMPT), *(_PROMPT + node for node in path)] for path in paths]
    ids = tokens[torch.tensor([(p + [0] * longest)[: _PROMPT + longest] for p in places])]
    logits = plain_logits(model, ids.to(model.device))[:, _PROMPT:].float().cpu()
    rows = {node: logits[i, at] for i, path in enumerate(paths) for at, node in enumerate(path)}
    return torch.stack([rows[node] for node in sorted(rows)])


def probe(backend: EagerBackend, want: Tensor) -> None:
    """Compares a small tree with its paths. Behaviour decides what is supported, not a list.

    Args:
        want: of `stock_logits`.

    Raises:
        UnsupportedError: they differ by more than rounding.
    """
    tokens = probe_tokens(backend.model).tolist()
    row = backend.open()
    try:
        backend.extend([Nodes(row, tokens[:_PROMPT], num_logits=1)])
        backend.commit([Kept(row, range(_PROMPT))])
        (logits,) = backend.extend([Nodes(row, tokens[_PROMPT:], _PROBE_PARENTS)])
    finally:
        backend.release(row)
    got = logits.float().cpu()
    spread = float(want.std()) or 1.0
    worst = float((got - want).abs().max()) / spread
    limit = _TOLERANCE.get(backend.model.dtype, 1e-3)
    if not worst <= limit:
        raise UnsupportedError(
            f"{type(backend.model).__name__} gives other logits in a tree than on its paths "
            f"(difference {worst:.2g} of their spread, limit {limit:g})"
        )
