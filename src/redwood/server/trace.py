"""One step as JSON for clients: the draft tree, and the path that was accepted."""

from __future__ import annotations

from typing import Any

from redwood.algorithms.sources import source_names
from redwood.engine.request import Step
from redwood.engine.stats import Stats
from redwood.server.tokens import TokenTexts


def describe(step: Step, stats: Stats, texts: TokenTexts) -> dict[str, Any]:
    """Returns a step as values for JSON.

    Args:
        stats: of the choice, this step included.

    Returns: `step`: number of the step, from 1; `nodes`: parent, token, text and the names of the
        sources (`algorithms.sources`) of each node, the root first, which has none; `accepted`: the
        accepted path as node indices, root first; `bonus`: the token after it, None where the text
        ended inside the path; `seconds` by stage; `generated`: tokens of this answer so far.
    """
    tokens, parents = step.tree.token_list, step.tree.parent_list
    sources = step.tree.sources or [0] * len(tokens)
    accepted = step.num_accepted
    bonus = step.token_ids[accepted] if accepted < len(step.token_ids) else None
    return {
        "step": stats.target_passes,
        "nodes": [
            {
                "parent": parent,
                "token": token,
                "text": texts.text(token),
                "sources": source_names(bits),
            }
            for parent, token, bits in zip(parents, tokens, sources, strict=True)
        ],
        "accepted": list(step.nodes[: accepted + 1]),
        "bonus": None if bonus is None else {"token": bonus, "text": texts.text(bonus)},
        "seconds": {stage: round(taken, 6) for stage, taken in stats.seconds.items()},
        "generated": stats.num_generated_tokens,
    }
