"""Pictures of token trees, as text and as SVG. Without torch, whose import takes seconds.

A tree is a list of parents, -1 first, `parents[i] < i`, siblings in rank order. Ranks, depths and
scores of its nodes are `Node`s, which `nodes_of` makes from acceptance rates.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

Rates = Sequence[float] | Sequence[Sequence[float]]

RADIUS = 13.0
_STEP_X, _STEP_Y, _MARGIN = 34.0, 58.0, 30.0
_STYLE = (
    "line{stroke:#9aa5b1;stroke-width:1.5}circle{stroke:#1f4d3a;stroke-width:1.2}"
    "text{font:9px sans-serif;text-anchor:middle;fill:#12261d}.note{font-size:11px;"
    "text-anchor:start}"
)


class Node(NamedTuple):
    """What a picture shows of a node.

    Args:
        rank: position among its siblings, from 1; 0 for the root.
        depth: 0 for the root.
        score: probability that the node is accepted: the product of the rates on its path.
    """

    rank: int
    depth: int
    score: float


def nodes_of(parents: Sequence[int], acceptance: Rates) -> list[Node]:
    """Returns rank, depth and score of every node.

    Source: the score is that of arXiv 2402.12374, section 3.1; the sum over the tree is
    `expected_tokens`.

    Args:
        parents: [N], -1 first.
        acceptance: [K] rates by rank, or [D, K], a row per depth of the parent; 0 past the ends.
    """
    rows = [list(row) for row in acceptance if isinstance(row, Sequence)]
    by_level = bool(rows)
    rates = rows or [[rate for rate in acceptance if not isinstance(rate, Sequence)]]
    nodes = [Node(0, 0, 1.0)]
    num_children = [0] * len(parents)
    for parent in parents[1:]:
        above = nodes[parent]
        row, rank = above.depth if by_level else 0, num_children[parent]
        num_children[parent] += 1
        rate = rates[row][rank] if row < len(rates) and rank < len(rates[row]) else 0.0
        nodes.append(Node(rank + 1, above.depth + 1, above.score * rate))
    return nodes


def text_lines(parents: Sequence[int], nodes: Sequence[Node]) -> Iterator[str]:
    """Yields the tree as lines of text, a node per line, parents above their children."""
    children = _children(parents)
    stack = [(0, "", "")]  # node, text before it, text before its children
    while stack:
        node, lead, below = stack.pop()
        label = f"rank {nodes[node].rank}" if node else "root"
        yield f"{lead}{label}  {nodes[node].score:.4f}"
        for i, child in enumerate(reversed(children[node])):
            last = i == 0
            stack.append(
                (child, below + ("└─ " if last else "├─ "), below + ("   " if last else "│  "))
            )


def positions(parents: Sequence[int]) -> list[tuple[float, int]]:
    """Returns (x, depth) of every node: leaves one apart, the others centred above their children.

    Guarantee: nodes of one depth are at least one apart.
    """
    children = _children(parents)
    xs = [0.0] * len(parents)
    depths = [0] * len(parents)
    num_leaves = 0
    stack = [0]
    while stack:
        node = stack.pop()
        if node:
            depths[node] = depths[parents[node]] + 1
        if not children[node]:
            xs[node] = float(num_leaves)
            num_leaves += 1
        stack.extend(reversed(children[node]))
    for node in reversed(range(len(parents))):
        if below := children[node]:
            xs[node] = (xs[below[0]] + xs[below[-1]]) / 2
    return list(zip(xs, depths, strict=True))


def svg(parents: Sequence[int], nodes: Sequence[Node], caption: str) -> str:
    """Returns the tree as an SVG document: a circle per node, its rank inside, its score below.

    The darker a node, the more likely it is accepted. A tooltip shows token path and score.
    """
    places = [(_MARGIN + x * _STEP_X, _MARGIN + depth * _STEP_Y) for x, depth in positions(parents)]
    width = max(max(x for x, _ in places) + _MARGIN, 2 * _MARGIN + 6.2 * len(caption))
    height = max(y for _, y in places) + 2 * _MARGIN
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:g}" height="{height:g}" '
        f'viewBox="0 0 {width:g} {height:g}" role="img">',
        f"<title>{_escaped(caption)}</title>",
        f"<style>{_STYLE}</style>",
        '<rect width="100%" height="100%" fill="#ffffff"/>',
    ]
    for (x, y), parent in zip(places[1:], parents[1:], strict=True):
        above_x, above_y = places[parent]
        parts.append(f'<line x1="{above_x:g}" y1="{above_y:g}" x2="{x:g}" y2="{y:g}"/>')
    for index, ((x, y), node) in enumerate(zip(places, nodes, strict=True)):
        name = f"rank {node.rank}" if index else "root"
        parts.append(
            f"<g><title>node {index}, {name}, depth {node.depth}, score {node.score:.6g}</title>"
            f'<circle cx="{x:g}" cy="{y:g}" r="{RADIUS:g}" fill="{_green(node.score)}"/>'
            f'<text x="{x:g}" y="{y + 3:g}">{node.rank if index else "•"}</text>'
            f'<text x="{x:g}" y="{y + RADIUS + 10:g}">{node.score:.3f}</text></g>'
        )
    parts.append(
        f'<text class="note" x="{_MARGIN:g}" y="{height - 9:g}">{_escaped(caption)}</text></svg>'
    )
    return "\n".join(parts) + "\n"


def _children(parents: Sequence[int]) -> list[list[int]]:
    children: list[list[int]] = [[] for _ in parents]
    for node, parent in enumerate(parents[1:], start=1):
        children[parent].append(node)
    return children


def _green(score: float) -> str:
    """From white at 0 to a leaf green at 1."""
    share = min(1.0, max(0.0, score))
    channels = (round(255 + share * (full - 255)) for full in (96, 190, 130))
    return "#" + "".join(f"{channel:02x}" for channel in channels)


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
