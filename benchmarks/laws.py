"""Recorded laws: what target and drafter said after each token of plainly decoded texts.

`record.py` makes a record; the tables read it. The drafter's law is that of its best tokens, which
is how `ModelDrafter` draws, so nothing is lost by keeping no others. The target's law is exact on
those tokens; the mass of all others stands in one last column, the rest.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from redwood.models._cache import cache_dir
from redwood.sampling import SamplingParams, draft_law

Array = NDArray[Any]
TEMPERATURES = tuple(round(0.1 * i, 1) for i in range(1, 13))
"""Temperatures that a record knows the target's whole mass at."""


class Laws(NamedTuple):
    """Laws at P positions.

    Args:
        target, draft: float64 [P, K + 1], columns in the drafter's order, best first; the last one
            is the rest, which the drafter never draws.
        num_cut: positions where top-p keeps more tokens than the record has in order.
    """

    target: Array
    draft: Array
    num_cut: int


@dataclass(frozen=True, eq=False)
class Record:
    """Texts, and logits at each of their P generated tokens.

    Args:
        tokens, ends, prompt_lengths: the texts one after another; where each ends; its prompt.
        prompts, places: [P], number of the text, and tokens before the position.
        target_logits, target_ids: [P, M], best first.
        draft_logits, draft_ids: [P, K], best first.
        target_at_draft: [P, K], the target's logits of the drafter's tokens.
        target_mass, draft_mass: [P, T], log of the sum of exp(logit / temperature) over all tokens.
        facts: the pair, the command, the commit.
    """

    tokens: Array
    ends: Array
    prompt_lengths: Array
    prompts: Array
    places: Array
    target_logits: Array
    target_ids: Array
    draft_logits: Array
    draft_ids: Array
    target_at_draft: Array
    target_mass: Array
    draft_mass: Array
    facts: dict[str, Any]

    @classmethod
    def load(cls, name: str) -> Record:
        """Returns the record of this name from the user's cache."""
        path = record_path(name)
        if not path.exists():
            raise SystemExit(f"there is no record {name}: make it with benchmarks/record.py")
        with np.load(path) as data:
            arrays = {f.name: data[f.name] for f in fields(cls) if f.name != "facts"}
            return cls(**arrays, facts=json.loads(str(data["facts"])))

    def save(self, name: str) -> Path:
        """Writes the record into the user's cache; returns where."""
        path = record_path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        arrays = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "facts"}
        np.savez_compressed(path, facts=json.dumps(self.facts), **arrays)
        return path

    def text(self, prompt: int) -> list[int]:
        """Returns the token ids of a prompt and its answer."""
        start = int(self.ends[prompt - 1]) if prompt else 0
        return [int(token) for token in self.tokens[start : self.ends[prompt]]]

    def laws(self, temperature: float, top_p: float = 1.0, draft: str = "cut") -> Laws:
        """Returns the laws at a temperature of `TEMPERATURES`, the target's truncated by top-p.

        Where top-p keeps more tokens than the record has in order, the unknown ones are taken to
        reach it exactly.

        Args:
            draft: the drafter's law: "cut" by top-p as the target's, "full", or "last": what is cut
                keeps a millionth of its mass, and so is drawn after everything else.
        """
        probs = self._draft_law(temperature, 1.0 if draft == "full" else top_p)
        if draft == "last":
            probs = (probs + 1e-6 * self._draft_law(temperature, 1.0)) / (1.0 + 1e-6)
        mass = self.target_mass[:, [TEMPERATURES.index(temperature)]]
        target = np.exp(self.target_at_draft.astype(np.float64) / temperature - mass)
        kept, num_cut = np.ones((len(target), 1)), 0
        if top_p < 1.0:
            border, kept, num_cut = self._nucleus(temperature, top_p, mass)
            target = np.where(self.target_at_draft >= border, target, 0.0)
        target /= kept
        rest = np.maximum(1.0 - target.sum(1, keepdims=True), 0.0)
        none = np.zeros_like(rest)
        target = np.hstack([target, rest])
        return Laws(target / target.sum(1, keepdims=True), np.hstack([probs, none]), num_cut)

    def _draft_law(self, temperature: float, top_p: float) -> Array:
        params = SamplingParams(temperature=temperature, top_p=top_p)
        logits = torch.from_numpy(self.draft_logits)
        probs: Array = draft_law(logits, params, logits.shape[1])[0].numpy()
        return probs

    def _nucleus(self, temperature: float, top_p: float, mass: Array) -> tuple[Array, Array, int]:
        """The lowest logit that top-p keeps [P, 1], the mass kept [P, 1], and cut positions."""
        probs = np.exp(self.target_logits.astype(np.float64) / temperature - mass)
        before = probs.cumsum(1) - probs
        last = (before < top_p).sum(1, keepdims=True) - 1
        border = np.take_along_axis(self.target_logits, last, 1)
        kept = np.where(self.target_logits >= border, probs, 0.0).sum(1, keepdims=True)
        cut = kept < top_p
        return border, np.where(cut, top_p, kept), int(cut.sum())


def greedy_laws(record: Record) -> Laws:
    """Returns the laws at temperature 0: the target's is its best token."""
    target = (record.draft_ids == record.target_ids[:, :1]).astype(np.float64)
    none = np.zeros((len(target), 1))
    rest = 1.0 - target.sum(1, keepdims=True)
    return Laws(np.hstack([target, rest]), np.hstack([np.zeros_like(target), none]), 0)


def record_path(name: str) -> Path:
    """Returns where the record of this name is."""
    return cache_dir() / "records" / f"{name}.npz"


def ratio(tops: Sequence[float] | Array, bottoms: Sequence[float] | Array) -> tuple[float, float]:
    """Returns sum(tops) / sum(bottoms) over prompts, and its standard error by the jackknife."""
    above, below = np.asarray(tops, float), np.asarray(bottoms, float)
    whole, count = float(above.sum() / below.sum()), len(above)
    if count < 2:
        return whole, float("nan")
    without = (above.sum() - above) / (below.sum() - below)
    spread = ((without - without.mean()) ** 2).sum() * (count - 1) / count
    return whole, float(np.sqrt(spread))


def mean_by_prompt(values: Array, prompts: Array) -> tuple[float, float]:
    """Returns the mean of values [P], and its standard error with the prompts as units."""
    units = np.unique(prompts)
    sums = [float(values[prompts == unit].sum()) for unit in units]
    return ratio(sums, [int((prompts == unit).sum()) for unit in units])
