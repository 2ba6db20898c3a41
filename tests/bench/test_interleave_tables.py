"""No measured run drafts from a table that has seen its answer."""

from __future__ import annotations

from pathlib import Path

import pytest

import redwood
from redwood.algorithms.successors import copy_of, successor_table
from redwood.bench.interleave import PLAIN, Candidate, alternate
from redwood.drafters.base import NgramDrafter
from redwood.sampling import SamplingParams

PROMPTS = [[5, 6, 7, 8], [40, 41, 42]]


@pytest.mark.parametrize("together", [True, False])
def test_repeats_and_candidates_do_not_learn_from_each_other(
    tiny_model_folder: Path, together: bool
) -> None:
    engine = redwood.load(tiny_model_folder, None, backend="eager")
    drafter = NgramDrafter(table=successor_table(1 << 20))
    candidates = [PLAIN, Candidate("a", drafter, 6), Candidate("b", drafter, 6)]
    params = SamplingParams(max_tokens=20)
    runs = alternate(engine, candidates, PROMPTS, params, repeats=3, together=together)
    for prompt in range(len(PROMPTS)):
        texts = [run.token_ids for runs_of in runs for run in runs_of[prompt]]
        assert all(text == texts[0] for text in texts)
    first = [run.stats.num_draft_tokens for runs_of in runs[1:] for run in runs_of[0]]
    again = alternate(engine, candidates[:2], PROMPTS[:1], params, together=together)
    assert again[1][0][0].stats.target_passes < len(again[1][0][0].token_ids), "it knows it now"
    assert drafter.table is not None and drafter.table.rows > 0
    fresh = NgramDrafter(table=successor_table(1 << 20))
    (_, (alone,)) = alternate(engine, [PLAIN, Candidate("", fresh, 6)], PROMPTS[:1], params)
    assert first[0] == alone[0].stats.num_draft_tokens, "from nothing, whoever else runs"


def test_a_copy_learns_on_its_own() -> None:
    import numpy as np

    table = successor_table(1 << 20)
    row = np.array([[1]], np.int32), np.array([[0.5]], np.float32)
    table.learn([], [7], [-1], *row)
    copied = copy_of(table)
    copied.learn([], [8], [-1], *row)
    assert copied.find([7]) == table.find([7]) and table.find([8]) == []
    assert (len(table), len(copied), copied.rows, copied.max_bytes) == (1, 2, 2, 1 << 20)
