"""Acceptance rates of a draft model by rank: along a text, and while decoding.

Along a text (teacher forcing) the random numbers of verification are integrated out: a position
gives the rate of every rank, not one outcome, so few positions suffice. While decoding, outcomes
are counted. Both use trees of one level. Only without-replacement draws (temperature 0: the best
tokens) are measured.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from redwood.algorithms.sequoia import draw_without_replacement
from redwood.backends.base import AcceptedPath, Backend, Nodes
from redwood.backends.rows import fill, readable
from redwood.bench.interleave import Candidate, run
from redwood.drafters.base import ModelDrafter
from redwood.drafters.model import DRAFT_WIDTH
from redwood.drafters.vocabulary import DraftVocabulary
from redwood.engine.engine import RowEngine, Step
from redwood.profiling.profile import MeasuredAcceptance
from redwood.sampling import SamplingParams, check_finite, draft_law, probs_from_scores, top

RANKS = 8
"""Ranks that are measured; past them a tree gains next to nothing."""

_CHUNK = 32  # positions whose logits are held together
_LEAST_MASS = 1e-12

Row = NDArray[np.float64]


class Text(NamedTuple):
    """A prompt and the plain answer to it, token ids."""

    prompt: list[int]
    answer: list[int]


def teacher_forced(
    target: Backend,
    draft: Backend,
    texts: Sequence[Text],
    temperature: float,
    *,
    ranks: int = RANKS,
    on_text: Callable[[], None] | None = None,
) -> MeasuredAcceptance:
    """Returns the mean acceptance rate by rank over all positions of plain answers.

    Source: arXiv 2402.12374, Def. 3.1, measured as its authors' code does: at a position, the k-th
    child's chance is (1 - sum of the earlier ones) times the chance that the residual rule keeps
    it. At temperature 0 it is 1 for the rank of the target's arg-max among the draft's best.
    """
    generator = np.random.default_rng(0)
    sums, counts = np.zeros((len(texts), ranks)), np.zeros(len(texts))
    for i, text in enumerate(texts):
        with closing(paired(target, draft, text)) as pairs:
            for wanted, drafted in pairs:
                sums[i] += position_chances(wanted, drafted, temperature, ranks, generator)
                counts[i] += 1
        if on_text is not None:
            on_text()
    return clustered(sums, counts, "teacher-forced")


def position_chances(
    target: Tensor,
    draft: Tensor,
    temperature: float,
    ranks: int,
    generator: np.random.Generator,
) -> Row:
    """Returns the acceptance rate by rank at one position, [ranks].

    Args:
        target, draft: logits [V] and [V'], V' <= V or cut to V.
        generator: draws the children above temperature 0.
    """
    draft = draft[: len(target)]
    check_finite(target)
    check_finite(draft)
    made = np.zeros(ranks)
    count = min(ranks, len(draft))
    if temperature == 0.0:
        best = top(draft[None], count)[1][0].numpy()
        made[:count] = best == int(target.float().cpu().numpy().argmax())
        return made
    params = SamplingParams(temperature=temperature)
    target_probs = probs_from_scores(target.detach().cpu().double(), params).numpy()
    probs, ids = (part[0].numpy() for part in draft_law(draft[None], params, DRAFT_WIDTH))
    children = draw_without_replacement(
        probs, generator.random(count), ids=ids, vocab_size=len(target_probs)
    )
    draft_probs = np.zeros_like(target_probs)
    draft_probs[ids] = probs
    made[:count] = kept_chances(target_probs, draft_probs, children)
    return made


def kept_chances(target_probs: Row, draft_probs: Row, children: Sequence[int]) -> Row:
    """Returns the acceptance rate of each of the given children, [k].

    Source: arXiv 2402.12374, Alg. 2, with the random numbers integrated out.

    Args:
        target_probs, draft_probs: [V], each of mass 1; not changed.
        children: [k] distinct tokens, drawn from draft_probs without replacement, in draw order.
    """
    wanted, drafted = target_probs.copy(), draft_probs.copy()
    made, remaining = np.zeros(len(children)), 1.0
    for rank, child in enumerate(children):
        keep = min(1.0, wanted[child] / drafted[child])
        made[rank] = remaining * keep
        remaining *= 1.0 - keep
        wanted = np.maximum(wanted - drafted, 0.0)
        mass = wanted.sum()
        if remaining < _LEAST_MASS or mass < _LEAST_MASS:
            break
        wanted /= mass
        drafted[child] = 0.0
        total = drafted.sum()
        if total <= 0.0:  # no mass: the draw is uniform over what was not drawn
            drafted[:] = 1.0
            drafted[list(children[: rank + 1])] = 0.0
            total = max(drafted.sum(), 1.0)
        drafted /= total
    return made


def decoded(
    engine: RowEngine,
    draft: Backend,
    prompts: Sequence[Sequence[int]],
    temperature: float,
    max_tokens: int,
    *,
    ranks: int = RANKS,
    on_text: Callable[[], None] | None = None,
) -> MeasuredAcceptance:
    """Returns acceptance rates by rank, counted while decoding with trees of one level."""
    ranks = min(ranks, draft.vocab_size, engine.target.vocab_size, engine.target.capacity - 1)
    candidate = Candidate("", ModelDrafter(draft, [-1] + [0] * ranks), 1 + ranks)
    sums, counts = np.zeros((len(prompts), ranks)), np.zeros(len(prompts))
    for i, prompt in enumerate(prompts):

        def count(step: Step, at: int = i) -> None:
            if len(step.tree) == 1 + ranks:  # the last token of a text has no children
                counts[at] += 1
                for node in step.nodes[1:]:
                    sums[at, node - 1] += 1

        params = SamplingParams(
            max_tokens=max_tokens,
            temperature=temperature,
            seed=i,
            verifier=plain_verifier(temperature),
        )
        run(engine, candidate, prompt, params, count)
        if on_text is not None:
            on_text()
    return clustered(sums, counts, "decoded")


def plain_verifier(temperature: float) -> str:
    """Returns the verifier for reproducible sampling without noise coupling."""
    return "auto" if temperature == 0.0 else "traversal"


def clustered(sums: Row, counts: Row, how: str) -> MeasuredAcceptance:
    """Returns rates with standard errors that are clustered by prompt.

    The positions of a single prompt count as independent.

    Args:
        sums: [G, K] by prompt and rank.
        counts: [G] positions of each prompt.
    """
    total = float(counts.sum())
    if total == 0.0:
        return MeasuredAcceptance([0.0] * sums.shape[1], [0.0] * sums.shape[1], 0, how)
    rates = sums.sum(0) / total
    groups = int((counts > 0).sum())
    if groups > 1:
        spread = ((sums - counts[:, None] * rates) ** 2).sum(0) * groups / (groups - 1)
        stderr = np.sqrt(spread) / total
    else:
        stderr = np.sqrt(rates * (1.0 - rates).clip(0.0) / total)
    return MeasuredAcceptance(rates.clip(0.0, 1.0).tolist(), stderr.tolist(), int(total), how)


def paired(target: Backend, draft: Backend, text: Text) -> Generator[tuple[Tensor, Tensor]]:
    """Yields target and draft logits [V] at every position of the answer that both can hold.

    Those of a draft model that scores a list of tokens are by token as well, see `DraftVocabulary`.
    """
    known = DraftVocabulary.of(draft)
    width = getattr(target, "num_embeddings", target.vocab_size)
    columns = known.columns(width)
    tokens = [*text.prompt, *text.answer][: min(target.capacity, draft.capacity)]
    start = len(text.prompt) - 1
    rows: list[tuple[Backend, int]] = []
    try:
        for backend in (target, draft):
            rows.append((backend, backend.open()))
            fill(*rows[-1], tokens[:start])
        for at in range(start, len(tokens) - 1, _CHUNK):
            chunk = tokens[at : min(at + _CHUNK, len(tokens) - 1)]
            wanted, drafted = (_append(*row, chunk) for row in rows)
            for one, other in zip(wanted, drafted, strict=True):
                yield one, known.spread(other[:columns], width) if known.ranked else other
    finally:
        for backend, row in rows:
            backend.release(row)


def _append(backend: Backend, row: int, tokens: Sequence[int]) -> Tensor:
    known = readable(backend, tokens)
    (logits,) = backend.extend([Nodes(row, known)])
    backend.commit([AcceptedPath(row, range(len(known)))])
    return logits
