"""Who runs and what is filled: rows join in order of arrival, prompts go in by chunks.

And which threads work: PyTorch's must not stand in the way of a backend that has its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch

from redwood.backends.base import Backend, Nodes
from redwood.context import Context
from redwood.drafting import Drafter, ModelDrafter, NgramDrafter, NoDrafter
from redwood.requests import Request
from redwood.tree import TokenTree


def admitted(
    waiting: Iterable[Request], running: Sequence[Request], max_rows: int, kv_tokens: int | None
) -> list[Request]:
    """Returns the waiting requests that may join, in order of arrival: none overtakes another.

    Args:
        kv_tokens: slots that all rows together may come to need; None: as many as they like.
    """
    joined: list[Request] = []
    used = sum(request.most_tokens for request in running)
    for request in waiting:
        used += request.most_tokens
        full = kv_tokens is not None and used > kv_tokens
        if full or len(running) + len(joined) >= max_rows:
            break
        joined.append(request)
    return joined


def chunks(
    filling: Iterable[Request], length: Callable[[int], int], budget: int
) -> list[tuple[Request, Nodes]]:
    """Returns the next parts of prompts, those that came first before others.

    The last token of a prompt is left out: it is the root of the first tree.

    Args:
        length: tokens in place, by row.
        budget: tokens of all parts together.
    """
    made = []
    for request in filling:
        done, end = length(request.row), len(request.context.token_ids) - 1
        part = request.context.token_ids[done : min(end, done + budget)]
        if part:
            made.append((request, Nodes(request.row, part, num_logits=0)))
            budget -= len(part)
    return made


def propose_each(
    drafter: Drafter, contexts: Sequence[Context], budgets: Sequence[int]
) -> list[TokenTree | Exception]:
    """Returns a tree per context, or what went wrong with it alone.

    Where a call for all fails, each is asked alone, with the chance that it had before.
    """
    several = len(contexts) > 1
    states = [context.rng.bit_generator.state for context in contexts] if several else []
    try:
        return list(drafter.propose(contexts, budgets))
    except Exception as error:
        if not several:
            return [error]
    made: list[TokenTree | Exception] = []
    for context, budget, state in zip(contexts, budgets, states, strict=True):
        drafter.release(context.key)
        context.rng.bit_generator.state = state
        try:
            made += drafter.propose([context], [budget])
        except Exception as error:
            made.append(error)
    return made


@contextmanager
def one_pool(target: Backend, drafter: Drafter) -> Iterator[None]:
    """Keeps PyTorch to one thread where the target, and what drafts, compute with their own.

    Its threads spin for a while after each small operation, on processors that the next pass needs:
    on two cores, with a draft model, that costs a fifth of the speed.
    """
    if not (_owns(target) and all(map(_quiet, getattr(drafter, "parts", [drafter])))):
        yield
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _owns(backend: Backend) -> bool:
    return bool(getattr(backend, "own_threads", False))


def _quiet(drafter: Drafter) -> bool:
    """Whether a drafter needs none of PyTorch's threads; others than ours may."""
    if isinstance(drafter, ModelDrafter):
        return _owns(drafter.backend)
    return isinstance(drafter, NoDrafter | NgramDrafter)
