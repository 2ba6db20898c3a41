"""Tokens per target pass by the size of the tree, for drafters that do not draw.

The drafter proposes one large tree at every position of a plain answer. A tree of n nodes is taken
to be the first n of it. For every size, decoding is then simulated along the text: from a position
to the one behind the accepted path and the extra token. At temperature 0 this is exact. Above it, a
node that was not drawn is accepted with its target probability, of which the sampled answer is an
unbiased sample.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from redwood.bench.acceptance import Text
from redwood.drafters.base import Drafter
from redwood.drafters.context import Context
from redwood.sampling import History, SamplingParams
from redwood.tree import TokenTree

SIZES = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 24, 32, 48, 64)


def tokens_by_size(
    drafter: Drafter,
    texts: Sequence[Text],
    temperature: float,
    vocab_size: int,
    sizes: Sequence[int] = SIZES,
) -> dict[int, float]:
    """Returns tokens per target pass by nodes of the tree, the root included; {} without texts."""
    found = (
        paths(drafter, text, temperature, vocab_size, max(sizes), -number)
        for number, text in enumerate(texts, start=1)
    )
    return tokens_along(found, sizes)


def tokens_along(
    walks: Iterable[Sequence[Sequence[int]]], sizes: Sequence[int]
) -> dict[int, float]:
    """As `tokens_by_size`, from the result of `paths` for every text."""
    tokens, passes = 0, dict.fromkeys(sizes, 0)
    for walk in walks:
        tokens += len(walk)
        for size in passes:
            at = 0
            while at < len(walk):
                at += 1 + sum(node < size for node in walk[at])
                passes[size] += 1
    return {size: tokens / count for size, count in passes.items() if count}


def paths(
    drafter: Drafter, text: Text, temperature: float, vocab_size: int, size: int, key: int
) -> list[list[int]]:
    """Per position of the answer, the nodes of a tree of `size` that its tokens go through."""
    tokens = list(text.prompt)
    params = SamplingParams(temperature=temperature)
    context = Context(key, tokens, params, History(tokens), vocab_size)
    paths = []
    try:
        for at, token in enumerate(text.answer):
            (tree,) = drafter.propose([context], [size])
            paths.append(_path(tree, text.answer[at:-1]))  # a last token is not drafted
            tokens.append(token)
            context.history.extend([token])
    finally:
        drafter.release(key)
    return paths


def _path(tree: TokenTree, news: Sequence[int]) -> list[int]:
    """The nodes below the root that spell the beginning of `news`, as far as they go."""
    at, path = 0, list[int]()
    for token in news:
        nodes = (
            node
            for node in range(at + 1, len(tree))
            if tree.parent_list[node] == at and tree.token_list[node] == token
        )
        at = next(nodes, -1)
        if at < 0:
            break
        path.append(at)
    return path
