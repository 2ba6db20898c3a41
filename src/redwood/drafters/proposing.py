"""Calling drafters: whatever one returns or raises, every context gets a tree that is verifiable.

Drafts are hints, so the answer to a drafter that fails is a bare root, which is a step of plain
decoding, and one line in the log. A well-formed tree with a wrong law cannot be detected: only the
code that drew it knows how.
"""

from __future__ import annotations

import inspect
import logging
import weakref
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from itertools import starmap
from operator import le
from typing import Any, Protocol

from redwood.algorithms.successors import BEST
from redwood.drafters.constrained import allowed, continued
from redwood.drafters.context import Context
from redwood.drafters.limits import NO_LIMITS, Limits
from redwood.errors import ArgumentError, CapacityError
from redwood.sampling import PathRows
from redwood.tree import Law, TokenTree

_log = logging.getLogger(__name__)
_logged: dict[int, set[str]] = {}  # faults in the log by id of their drafter
_UNDRAWN = frozenset((int(Law.POINT), int(Law.COUPLED)))
_ROUNDING = 1e-6


class _Proposer(Protocol):
    """The part of a drafter that is used here; see `redwood.drafters.base.Drafter`."""

    @property
    def propose(self) -> Callable[..., list[TokenTree]]: ...
    def release(self, key: int) -> None: ...


def proposals(
    drafter: _Proposer,
    contexts: Sequence[Context],
    budgets: Sequence[int],
    limits: Limits = NO_LIMITS,
) -> list[TokenTree]:
    """Returns a tree per context, within its budget; a bare root where the drafter failed.

    Undrawn nodes that a request's constraint forbids are left out.

    Where a call for all fails, each is asked alone, from the random state that it had before. A
    user's own drafter that fails for one alone then releases this one.

    Raises: nothing but MemoryError, and what is no `Exception`.
    """
    several = len(contexts) > 1
    states = [context.rng.bit_generator.state for context in contexts] if several else []
    made = _asked(drafter, contexts, budgets, limits)
    if isinstance(made, Exception):
        made = [] if several else [made]
        for context, budget, state in zip(contexts, budgets, states, strict=False):  # if several
            context.rng.bit_generator.state = state
            alone = _asked(drafter, [context], [budget], limits)
            made += [alone] if isinstance(alone, Exception) else alone
    trees = []
    for context, budget, tree in zip(contexts, budgets, made, strict=True):
        error = tree if isinstance(tree, Exception) else _fault(drafter, context, tree, budget)
        if error is not None:
            log_fault(drafter, error)
            if not _is_ours(drafter):
                release(drafter, context.key)
            tree = TokenTree.chain(context.token_ids[-1:])
        trees.append(permitted(context, tree))
    return trees


def permitted(context: Context, tree: TokenTree) -> TokenTree:
    """Returns a tree without the undrawn nodes that the request's constraint forbids.

    Raises: nothing but MemoryError; where the constraint fails, the tree stays as it is.
    """
    return _constrained(allowed, context, tree, len(tree))


def with_forced(context: Context, tree: TokenTree, budget: int) -> TokenTree:
    """Returns a tree from `proposals` with what the request's constraint expects; see `continued`.

    Raises: nothing but MemoryError; where the constraint fails, the tree stays as it is.
    """

    def change(context: Context, tree: TokenTree) -> TokenTree:
        return continued(context, tree, budget)

    return _constrained(change, context, tree, budget)


def _constrained(
    change: Callable[[Context, TokenTree], TokenTree], context: Context, tree: TokenTree, most: int
) -> TokenTree:
    """A tree changed by the request's constraint; the tree itself where that fails."""
    if context.constraint is None:
        return tree
    try:
        made = change(context, tree)
        if made is not tree:
            check_tree(context, made, max(most, len(tree)))
        return made
    except MemoryError:
        raise
    except Exception as error:
        log_fault(context.constraint, error)
        return tree


def prefill(drafter: _Proposer, contexts: Sequence[Context]) -> None:
    """Prefills texts that are new to a drafter, where it has a `prefill`, before it is timed."""
    try:
        read = getattr(drafter, "prefill", None)
        if read is not None:
            read(contexts)
    except MemoryError:
        raise
    except Exception as error:  # it fails again where it drafts
        log_fault(drafter, error)


def observe(drafter: Any, context: Context, tree: TokenTree, rows: PathRows) -> None:
    """Shows a drafter that has `observe` what the target says after each node of a scored tree."""
    try:
        if not drafter.observes(context):
            return
        best = rows.best_few(BEST)
        if best is not None:  # else verification raises
            drafter.observe(context, tree, *best)
    except MemoryError:
        raise
    except Exception as error:
        log_fault(drafter, error)


def release(drafter: _Proposer, key: int) -> None:
    """Lets a drafter forget a request."""
    try:
        drafter.release(key)
    except MemoryError:
        raise
    except Exception as error:
        log_fault(drafter, error)


def _asked(
    drafter: _Proposer, contexts: Sequence[Context], budgets: Sequence[int], limits: Limits
) -> list[Any] | Exception:
    """As many trees as contexts, or the error."""
    try:
        more = [limits] if _takes_limits(type(drafter)) else []
        answer: Any = drafter.propose(contexts, budgets, *more) if contexts else []
        made = list(answer) if isinstance(answer, Iterable) else [answer]
    except MemoryError:
        raise
    except Exception as error:
        return error
    if len(made) != len(contexts):
        return ArgumentError(f"it made {len(made)} trees for {len(contexts)} texts")
    return made


@lru_cache(maxsize=256)
def _takes_limits(kind: type) -> bool:
    """Whether drafters of this class take the limits of a step; users' own need not."""
    try:
        return "limits" in inspect.signature(kind.propose).parameters  # type: ignore[attr-defined]
    except (AttributeError, TypeError, ValueError):
        return False


def _fault(drafter: _Proposer, context: Context, tree: Any, budget: int) -> Exception | None:
    """Why this tree cannot be verified; None if it can."""
    try:
        check_tree(context, tree, budget)
        if not _is_ours(drafter):
            _check_rows(context, tree)
    except MemoryError:
        raise
    except Exception as error:
        return error
    return None


def check_tree(context: Context, tree: Any, budget: int) -> None:
    """Raises unless this is a tree below the last token, in the vocabulary and the budget."""
    if not isinstance(tree, TokenTree):
        raise ArgumentError(f"it made a {type(tree).__name__}, which is no TokenTree")
    tokens = tree.token_list
    if tokens[0] != context.token_ids[-1]:
        raise ArgumentError(f"its root is {tokens[0]}, not {context.token_ids[-1]}")
    if len(tokens) > budget:
        raise CapacityError(f"it made {len(tokens)} nodes for a budget of {budget}")
    if max(tokens) >= context.vocab_size:
        raise ArgumentError(f"its token {max(tokens)} is beyond {context.vocab_size} tokens")
    if tree.estimates is not None and len(tokens) > 1:
        estimates = [1.0, *map(float, tree.estimates[1:])]
        above = [estimates[parent] + _ROUNDING for parent in tree.parent_list[1:]]
        if not all(starmap(le, zip(estimates[1:], above, strict=True))) or min(estimates) < 0.0:
            raise ArgumentError("its estimates rise from parent to child, or are no chances")


def _check_rows(context: Context, tree: TokenTree) -> None:
    """Raises where a law or a draft row does not fit the rule that verifies the tree."""
    laws = tree.law_list[1:]
    if context.params.temperature > 0.0:
        coupled = context.noise is not None
        if coupled and not _UNDRAWN.issuperset(laws):
            raise ArgumentError("it drew with coins of its own for a text of shared noise")
        if not coupled and Law.COUPLED in laws:
            raise ArgumentError("it made COUPLED nodes for a text without shared noise")
    drawn = zip(tree.law_list[1:], tree.draft_row_list[1:], strict=True)
    for index in {row for law, row in drawn if law not in _UNDRAWN}:
        probs, ids = tree.draft_row(index)
        size = len(probs) if ids is None else 1 + int(ids[probs > 0.0].max(initial=-1))
        fits = size == context.vocab_size if ids is None else size <= context.vocab_size
        if not fits or not float(probs.sum()) > 0.0:
            raise ArgumentError(f"its draft row {index} is no law over the vocabulary")


def _is_ours(drafter: _Proposer) -> bool:
    """Whether its trees are right by construction, and it stays usable after it raised."""
    return type(drafter).__module__.split(".")[0] == "redwood"


def log_fault(drafter: object, error: Exception) -> None:
    """Logs a fault of a drafter, or of its caller, one line for each kind and drafter."""
    logged = _logged.get(id(drafter))
    if logged is None:
        logged = _logged[id(drafter)] = set()
        try:
            weakref.finalize(drafter, _logged.pop, id(drafter), None)
        except TypeError:  # it takes no weak reference: its entry stays
            _log.debug("%s cannot be watched", type(drafter).__name__)
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    at = "" if place is None else f"{place.tb_frame.f_code.co_filename}:{place.tb_lineno}"
    kind = f"{type(error).__name__} {at}"
    if kind not in logged:
        logged.add(kind)
        name = getattr(type(drafter), "__name__", "a drafter")
        said = f"{type(error).__name__}: {error}".replace("\n", " ")
        _log.warning("%s failed, texts go on without its drafts (said once): %s", name, said)
        _log.debug("where it failed", exc_info=error)
