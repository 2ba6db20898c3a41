"""The check at load: a wrong model is refused, rounding is not. Behaviour decides, not a list.

Two questions, asked apart since rounding grows with the processor, the dtype and the weights (on
some processors bf16 moves logits by more than their spread) and what is wrong does not:

* Does a module of this class compute a tree as it computes its paths? Compared to 1e-4 on a small
  instance with the same layers, in float32; see `small`.
* Does the module that was loaded do about the same? Its own rounding is measured by computing the
  same thing again from slightly moved embeddings, after which every rounding that follows falls out
  differently, and a tree may be off by a few times that.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from redwood.backends.base import AcceptedPath, Nodes
from redwood.backends.eager.backend import ATTENTION, EagerBackend
from redwood.backends.eager.recurrent import Form
from redwood.backends.eager.small import small_models
from redwood.errors import ModelError, UnsupportedError
from redwood.models._transformers import plain_logits
from redwood.models.tokenizer import load_tokenizer
from redwood.sampling import check_finite

_PARENTS = [-1, 0, 0, 1, 2, 3]
_PROMPT = 18  # tokens before the tree
_TEXT = (
    "The old mill stands by the river, and every morning the miller opens its doors for the "
    "farmers who bring their grain from the valley."
)
_STRUCTURE = 1e-4  # largest difference on a small model, in units of the logits' spread
# Seed, dtype and gain. A wrong structure is wrong with all of these; a tie of two experts, float32
# that is multiplied with fewer bits, or a model whose layers make much of rounding, is not.
_DRAWS = ((0, torch.float32, 1.0), (1, torch.float64, 0.7), (2, torch.float32, 0.4))
_MOVED = 2  # times that the real thing is computed from moved embeddings
_LEAST_MOVE = 2.0**-13  # of a number: enough for 8-bit activations to be rounded to another number
_ALLOWED = 4.0  # times the rounding that was seen
_LEAST = {torch.float16: 5e-3, torch.bfloat16: 3e-2}  # allowed at least, in units of the spread
_LEAST_EXACT = 1e-4

PROBE_SLOTS = _PROMPT + len(_PARENTS)
"""Slots of a row that the check needs."""


class Stock(NamedTuple):
    """What the stock module says of the tokens."""

    tokens: list[int]
    """The prompt, and the tree's."""
    logits: Tensor
    """Of the tree's nodes, path by path: float32 [nodes, V]."""
    rounding: float
    """How far the same computation is from itself; see `distance`."""


class Structure(NamedTuple):
    """What small models of the same make have shown."""

    attention: str
    """Stock attention to compare the real one with."""
    forms: tuple[Form, ...]
    """In which its recurrent layers may be called, the best first; see `Form`."""


def distance(got: Tensor, want: Tensor) -> float:
    """Returns the largest difference of a node's logits [nodes, V], in units of their spread.

    A node's difference is the root of the mean square over the vocabulary: what rounding does to a
    single logit of 150,000 says little.
    """
    spread = want.std(-1).clamp_min(1e-30)
    return float(((got - want).square().mean(-1).sqrt() / spread).max())


def check_structure(model: Any) -> Structure:
    """Checks small models of the same make.

    The attention to compare the real one with is "sdpa", whose rounding is ours, unless this
    model's leaves something out there, such as the soft cap of Gemma 2, or no small model can be
    made: then it is "eager".

    Raises:
        UnsupportedError: a tree gets other logits than its paths, or never gets to our attention.
    """
    worst, kernel = 0.0, "eager"
    for draw in _DRAWS:
        small, off = None, None
        for small in small_models(model, *draw):
            try:
                want = _small_stock(small, "eager")
            except Exception:
                continue
            off = {form: _off(small, want, form) for form in _forms(small)}
            break
        if off is None:
            if worst:
                break  # this class does not run in float64
            return Structure(kernel, ("several", "single"))  # "any" could not be seen to be right
        assert small is not None
        right = [form for form, by in off.items() if by <= _STRUCTURE]
        if right:
            kernel = "sdpa" if _has_sdpa(small, want) else "eager"
            return Structure(kernel, ("any",) if len(right) == len(off) else tuple(right))
        worst = max(worst, *off.values())
    raise UnsupportedError(
        f"{type(model).__name__} gives other logits in a tree than on its paths (difference "
        f"{worst:.2g} of their spread on a small model of the same layers, limit {_STRUCTURE:g})"
    )


def _small_stock(small: Any, attention: str) -> Stock:
    small.set_attn_implementation(attention)
    tokens = torch.randint(
        1,
        small.config.get_text_config().vocab_size,
        (PROBE_SLOTS,),
        generator=torch.Generator().manual_seed(0),
    )
    stock = stock_logits(small, tokens.tolist())
    check_finite(stock.logits)
    return stock


def _forms(small: Any) -> tuple[Form, ...]:
    """Ways to go on from a state that are to be tried; where all are right, any is."""
    return ("several", "single") if EagerBackend(small, PROBE_SLOTS).recurrent.modules else ("any",)


def _off(small: Any, want: Stock, form: Form) -> float:
    small.set_attn_implementation(ATTENTION)
    backend = EagerBackend(small, PROBE_SLOTS)
    backend.recurrent.form = form
    got = tree_logits(backend, want.tokens)
    off = float((got - want.logits).abs().max()) / (float(want.logits.std()) or 1.0)
    return off if off == off else float("inf")


def _has_sdpa(small: Any, want: Stock) -> bool:
    try:
        got = _small_stock(small, "sdpa").logits
    except Exception:
        return False
    return float((got - want.logits).abs().max()) <= _STRUCTURE * float(want.logits.std())


def natural_tokens(model: Any) -> list[int]:
    """Returns a sentence as the model's own tokenizer spells it: prompt and tree.

    It has PROBE_SLOTS tokens, or as many as the context of a tiny model. Where no tokenizer
    is in the folder of the weights, the first ids of the vocabulary: mostly single characters.
    """
    text = model.config.get_text_config()
    vocab_size = int(text.vocab_size)
    context = getattr(text, "max_position_embeddings", None) or PROBE_SLOTS
    count = max(len(_PARENTS) + 1, min(PROBE_SLOTS, context))
    folder = Path(getattr(model.config, "name_or_path", None) or "")
    ids: list[int] = []
    if folder.is_dir() and (folder / "tokenizer_config.json").is_file():
        try:
            ids = load_tokenizer(folder).encode(_TEXT)[:count]
        except ModelError:
            ids = []  # it is not needed for this
    if len(ids) < count or max(ids) >= vocab_size:
        ids = [i % vocab_size for i in range(1, count + 1)]
    return ids


def stock_logits(model: Any, tokens: Sequence[int]) -> Stock:
    """Returns what the module says as it came, path by path, and how much of that is rounding.

    All in one forward: weights may have to come from a disk.
    """
    paths, prompt = _paths(), len(tokens) - len(_PARENTS)
    longest = max(map(len, paths))
    # A shorter path is filled up behind its end, where nothing before it can see.
    places = [[*range(prompt), *(prompt + node for node in path)] for path in paths]
    filled = [(place + [0] * longest)[: prompt + longest] for place in places]
    ids = torch.tensor(tokens)[torch.tensor(filled * (1 + _MOVED))]
    with torch.inference_mode(), _moved(model, len(paths), len(ids)):
        logits = plain_logits(model, ids.to(model.device), longest)
    logits = logits[:, -longest:].float().cpu()
    nodes = [
        torch.stack([logits[first + i, at] for i, at in _of_nodes(paths)])
        for first in range(0, len(ids), len(paths))
    ]
    return Stock(list(tokens), nodes[0], max(distance(each, nodes[0]) for each in nodes[1:]))


def _paths() -> list[list[int]]:
    paths = []
    for leaf in sorted(set(range(len(_PARENTS))) - set(_PARENTS)):
        path = [leaf]
        while _PARENTS[path[0]] >= 0:
            path.insert(0, _PARENTS[path[0]])
        paths.append(path)
    return paths


def _of_nodes(paths: list[list[int]]) -> list[tuple[int, int]]:
    """Path and place in it, of every node."""
    found = {node: (i, at) for i, path in enumerate(paths) for at, node in enumerate(path)}
    return [found[node] for node in sorted(found)]


@contextmanager
def _moved(model: Any, first: int = 0, rows: int | None = None) -> Iterator[None]:
    """Moves embeddings by up to a unit of their last place.

    Args:
        first: rows that stay as they are.
        rows: of the forwards that this is for; None: of any.
    """
    table = model.get_input_embeddings()

    def move(module: Any, given: Any, made: Any) -> Any:
        if not isinstance(made, Tensor) or rows not in (None, len(made)):
            return made
        step = max(torch.finfo(made.dtype).eps, _LEAST_MOVE)
        draw = torch.rand(made.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
        draw[:first] = 0
        return (made.float() * (1 + step * draw.to(made.device))).to(made.dtype)

    if table is None:  # a part of a model without its beginning
        yield
        return
    hook: Any = table.register_forward_hook(move)
    try:
        yield
    finally:
        hook.remove()


def allowed(rounding: float, dtype: torch.dtype) -> float:
    """Returns the largest `distance` that such rounding explains, in a dtype."""
    return max(_LEAST.get(dtype, _LEAST_EXACT), _ALLOWED * rounding)


def own_rounding(model: Any) -> float:
    """Returns how far a model's own answer for a small tree is from itself; see `distance`.

    Args:
        model: that has our attention.
    """
    tokens, backend = natural_tokens(model), EagerBackend(model, PROBE_SLOTS)
    want = tree_logits(backend, tokens)
    with _moved(model):
        return distance(tree_logits(backend, tokens), want)


def tree_logits(backend: EagerBackend, tokens: Sequence[int]) -> Tensor:
    """Returns the logits of the tree behind the prompt, in one pass: float32 [nodes, V]."""
    row, prompt = backend.open(), len(tokens) - len(_PARENTS)
    ends = [prompt]
    if backend.recurrent.modules:  # from a state by several tokens, by one, and by what was kept
        ends = sorted({max(1, prompt // 2), prompt // 2 + 1, prompt})
    try:
        for at in ends:
            read = tokens[backend.length(row) : at]
            more = read[:1] if len(ends) > 1 else []  # is not kept
            backend.extend([Nodes(row, [*read, *more], num_logits=1)])
            backend.commit([AcceptedPath(row, range(len(read)))])
        (logits,) = backend.extend([Nodes(row, tokens[prompt:], _PARENTS)])
    finally:
        backend.release(row)
    return logits.float().cpu()


def probe(backend: EagerBackend, stock: Stock) -> None:
    """Compares a small tree of the real thing with its paths.

    Raises:
        UnsupportedError: they differ by more than rounding.
        NumericalError: the tree's logits are NaN or infinite.
    """
    got = tree_logits(backend, stock.tokens)
    check_finite(got)
    off = distance(got, stock.logits)
    limit = allowed(stock.rounding, backend.model.dtype)
    if not off <= limit:
        raise UnsupportedError(
            f"{type(backend.model).__name__} gives other logits in a tree than on its paths "
            f"(difference {off:.2g} of their spread, where rounding explains {limit:.2g})"
        )
