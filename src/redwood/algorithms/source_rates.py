"""Acceptance rates of retrieved candidates: what a source knows of one, as a cell with a rate.

Text and stored texts describe a candidate by match length and share, the table by the lengths of
its keys and the probability in each, a prediction by how long it was right. `algorithms.retrieval`
asks the sources; where several know the context, their rates together make a joint cell.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from redwood.errors import ArgumentError

try:
    from redwood import _native

    _native.Rates  # noqa: B018  # an extension built from older sources lacks it
    compiled = True
except (ImportError, AttributeError):
    compiled = False

_MEMORY = 512.0  # trials after which the counts of a cell are halved, since texts change
_BELIEF, _JOINT_BELIEF = 8.0, 4.0  # weight of a prior, in trials
MOST_MATCH = 8
"""Tokens compared at most."""
_SHARES, _STORE_SHARES, _PROBS, _LEVELS = 5, 8, 11, 8
RUN_PRIOR = (0.4, 0.7, 0.85, 0.9, 0.95)
"""Acceptance rate of a predicted token after 0, 1, ... accepted ones in a row, before any trial."""
_OF_STORE = 2 * MOST_MATCH * _SHARES
_OF_TABLE = _OF_STORE + 2 * MOST_MATCH * _STORE_SHARES
_OF_PREDICTED = _OF_TABLE + 6 * _PROBS * _PROBS
_OF_JOINT = _OF_PREDICTED + len(RUN_PRIOR)
CELLS = _OF_JOINT + _LEVELS**4
"""Number of cells of all sources, and of their combinations."""
# Edges of probabilities, each 2^-1/2 of the one before, and the middle of each bin; not named last.
_HALVES = (
    *(0.7071067811865476, 0.5, 0.35355339059327373, 0.25, 0.17677669529663687, 0.125),
    *(0.08838834764831843, 0.0625, 0.04419417382415922),
)
_MIDDLES = (
    *(0.8408964152537145, 0.5946035575013605, 0.42044820762685725, 0.29730177875068026),
    *(0.21022410381342863, 0.14865088937534013, 0.10511205190671431, 0.07432544468767006),
    *(0.052556025953357156, 0.03716272234383503, 0.005),
)
_LEVEL_EDGES = (0.05, 0.15, 0.35, 0.6, 0.85)


def text_cell(match: int, count: int, total: int, *, longest: bool) -> int:
    """Returns the cell of a candidate from the text itself.

    Args:
        match: matching tokens of context, drafted ones included; 1 or more.
        count, total: occurrences of this token behind the match, and of any; 1 <= count <= total.
        longest: whether this is the longest match.
    """
    if count == total:
        share = 3 if total == 1 else 4  # once is not always
    else:
        share = 2 if 2 * count >= total else 1 if 4 * count >= total else 0
    return _match(match, longest) * _SHARES + share


def store_cell(match: int, count: int, total: int, *, longest: bool) -> int:
    """Returns the cell of a candidate from stored texts; arguments as of `text_cell`.

    `total` is the size of a sample: few occurrences that agree are weaker evidence than many.
    """
    if count == total:
        share = 4 + (1 if total == 1 else 2 if total < 5 else 3)
    else:
        share = sum(count >= edge * total for edge in (0.1, 0.25, 0.5, 0.8))
    return _OF_STORE + _match(match, longest) * _STORE_SHARES + share


def _match(match: int, longest: bool) -> int:
    return longest * MOST_MATCH + min(match, MOST_MATCH) - 1


def table_cell(first: int, second: int, in_first: float, in_second: float) -> int:
    """Returns the cell of a candidate from the table.

    Args:
        first, second: lengths of the two longest keys found, `second` 0 where there is one.
        in_first, in_second: the candidate's probability in each, 0 where it is not named.
    """
    pair = first - 1 if second == 0 else 3 if first == 2 else 3 + second
    bins = [_prob_bin(prob) if prob > 0.0 else _PROBS - 1 for prob in (in_first, in_second)]
    return _OF_TABLE + (pair * _PROBS + bins[0]) * _PROBS + bins[1]


def _prob_bin(prob: float) -> int:
    return sum(prob <= edge for edge in _HALVES)


def predicted_cell(run: int) -> int:
    """Returns the cell of a predicted token after `run` of them that were right."""
    return _OF_PREDICTED + min(run, len(RUN_PRIOR) - 1)


def joint_cell(levels: Sequence[int]) -> int:
    """Returns the cell of a candidate that several sources speak of.

    Args:
        levels: by source: 0 if it does not know the context, 1 if it does and does not name the
            token, else `level`.
    """
    joint = 0
    for level in levels:
        joint = joint * _LEVELS + level
    return _OF_JOINT + joint


def level(rate: float) -> int:
    """Returns the level of a source that names the token, from its acceptance rate."""
    return 2 + bisect_right(_LEVEL_EDGES, rate)


def prior_of(cell: int) -> float:
    """Returns the acceptance rate that is believed of a source's cell before any trial.

    Longer matches, larger shares and higher probabilities are accepted more often; other texts less
    often than the text itself.
    """
    if cell < _OF_STORE:
        match, share = divmod(cell, _SHARES)
        trust = 0.3 if match < MOST_MATCH else 1.0
        part = (0.1, 0.3, 0.6, 0.75, 0.9)[share]
        return trust * part * (0.5 + 0.5 * (match % MOST_MATCH + 1) / MOST_MATCH)
    if cell < _OF_TABLE:
        match, share = divmod(cell - _OF_STORE, _STORE_SHARES)
        trust = 0.6 if match < MOST_MATCH else 0.9
        part = (0.04, 0.15, 0.35, 0.6, 0.85, 0.5, 0.75, 0.95)[share]
        return trust * part * (0.4 + 0.6 * (match % MOST_MATCH + 1) / MOST_MATCH)
    if cell < _OF_PREDICTED:
        first, second = divmod((cell - _OF_TABLE) % _PROBS**2, _PROBS)
        return max(_MIDDLES[first], _MIDDLES[second])
    return RUN_PRIOR[cell - _OF_PREDICTED]


class Rates:
    """Counts by cell: candidates below accepted nodes, and how many of them were accepted.

    The reference of the compiled one.

    Attributes:
        hits, trials: [CELLS], with decay.
    """

    def __init__(self) -> None:
        self.hits, self.trials = [0.0] * CELLS, [0.0] * CELLS

    def rate(self, cell: int, prior: float) -> float:
        """Returns the acceptance rate of a cell, given what is believed without any trial."""
        belief = _BELIEF if cell < _OF_JOINT else _JOINT_BELIEF
        return (belief * prior + self.hits[cell]) / (belief + self.trials[cell])

    def count(self, cell: int, hit: bool) -> None:
        """Counts one candidate; hit: it was accepted."""
        if self.trials[cell] >= _MEMORY:
            self.hits[cell] *= 0.5
            self.trials[cell] *= 0.5
        self.hits[cell] += hit
        self.trials[cell] += 1.0

    def load(self, hits: Sequence[float], trials: Sequence[float]) -> None:
        """Replaces the counts."""
        if not len(hits) == len(trials) == CELLS:
            raise ValueError("another number of cells")
        self.hits, self.trials = list(hits), list(trials)


AnyRates: TypeAlias = "Rates | _native.Rates"


class LearnedRates:
    """Rates over all texts, with which each text begins.

    Attributes:
        rates: as a retriever takes them.
    """

    def __init__(self) -> None:
        self.rates: AnyRates = _native.Rates() if compiled else Rates()

    def __deepcopy__(self, memo: dict[int, Any]) -> LearnedRates:
        copied = LearnedRates()
        copied.rates.load(self.rates.hits, self.rates.trials)
        return copied

    def to_dict(self) -> dict[str, Any]:
        """Returns the counts that are not 0, as plain values for JSON."""
        cells = [cell for cell, trials in enumerate(self.rates.trials) if trials > 0.0]
        hits, trials = self.rates.hits, self.rates.trials
        return {
            "cells": cells,
            "hits": [hits[cell] for cell in cells],
            "trials": [trials[cell] for cell in cells],
        }

    def load(self, seen: Mapping[str, Any]) -> None:
        """Loads counts from `to_dict`; without cells they are those of the text, as older profiles
        have them.

        Raises:
            ArgumentError: cells or counts that cannot be.
        """
        try:
            hits, trials = (np.array(seen[name], np.float64) for name in ("hits", "trials"))
            cells = np.array(seen.get("cells", range(_OF_STORE)), np.int64)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ArgumentError(f"a reliability table needs hits and trials: {error}") from error
        if not hits.shape == trials.shape == cells.shape == (cells.size,):
            raise ArgumentError(f"a reliability table must have counts for {cells.size} cells")
        if not ((cells >= 0) & (cells < CELLS)).all():
            raise ArgumentError(f"a reliability table must have cells below {CELLS}")
        if not ((hits >= 0.0) & (hits <= trials) & (trials < np.inf)).all():
            raise ArgumentError("a reliability table has counts that cannot be")
        all_hits, all_trials = np.zeros(CELLS), np.zeros(CELLS)
        all_hits[cells], all_trials[cells] = hits, trials
        self.rates.load(all_hits.tolist(), all_trials.tolist())
