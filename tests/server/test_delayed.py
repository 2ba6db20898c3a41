"""A grammar that begins inside an answer, on every path where that path says so."""

from __future__ import annotations

from typing import Any

import torch

from redwood.server.delayed import DelayedGrammar

WORDS = {0: b"a", 1: b"</thi", 2: b"nk>", 3: b"</think>", 4: b"<tool_call>", 5: b"<think>", 6: b"b"}


class Only:
    """A grammar of one token for ever; says where it began."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, token_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        made = torch.full_like(scores, -torch.inf)
        made[0, 6] = scores[0, 6]
        return made

    def accepts(self, text: Any, path: Any) -> int:
        return next((i for i, token in enumerate(path) if token != 6), len(path))

    def ahead(self, text: Any, path: Any, most: int) -> list[int]:
        return [self.length]


def grammar(*awaited: str, unless: int | None = None) -> DelayedGrammar:
    return DelayedGrammar(Only, WORDS.__getitem__, awaited, 2, unless)


def free(processor: DelayedGrammar, *answer: int) -> bool:
    """Whether any token may follow an answer, behind a prompt of two tokens."""
    row = processor(torch.tensor([[9, 9, *answer]]), torch.zeros(1, 7))
    return bool(torch.isfinite(row).all())


def test_it_begins_behind_the_text_that_is_awaited() -> None:
    made = grammar("</think>")
    assert free(made) and free(made, 0) and not free(made, 0, 3) and not free(made, 0, 3, 6)
    assert free(made, 0, 1) and not free(made, 0, 1, 2) and free(made, 1, 0, 2)


def test_any_order_of_paths_is_answered_alike() -> None:
    made = grammar("</think>", "<tool_call>")
    for _ in range(2):
        assert free(made, 0, 3) and not free(made, 0, 3, 4)
        assert free(made, 4, 0) and not free(made, 3, 0, 4) and free(made, 3, 0, 0)
        assert free(made, 4)


def test_reasoning_that_may_be_left_out() -> None:
    made = grammar("</think>", unless=5)
    row = made(torch.tensor([[9, 9]]), torch.zeros(1, 7))
    assert torch.isfinite(row).nonzero()[:, 1].tolist() == [5, 6]
    assert free(made, 5) and free(made, 5, 0) and not free(made, 5, 0, 3) and not free(made, 6)


def test_a_draft_is_free_up_to_where_the_grammar_begins() -> None:
    made = grammar("</think>")
    assert made.accepts([9, 9], [0, 0, 3, 6, 6]) == 5
    assert made.accepts([9, 9], [0, 0, 3, 6, 0, 6]) == 4
    assert made.accepts([9, 9, 0, 3], [0]) == 0
    assert made.ahead([9, 9, 0], [], 4) == [] and made.ahead([9, 9, 0], [3], 4) == [4]
    assert made.accepts([9, 9, 0, 3, 6], [6]) == 1 and made.accepts([9, 9], [3, 6, 6]) == 3
