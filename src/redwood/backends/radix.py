"""A radix tree over token ids, whose entries are rows that hold keys and values of a text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field


@dataclass(eq=False)
class Entry:
    """A text and the row that holds it.

    Args:
        tokens: of which the row holds keys and values, all of them.
        used: when it was last of use, in ticks of whoever keeps it.
    """

    row: int
    tokens: list[int]
    used: int = 0


@dataclass(eq=False)
class _Node:
    edge: list[int] = field(default_factory=list)  # tokens from the parent's text to this one's
    children: dict[int, _Node] = field(default_factory=dict)  # by first token of the edge
    entry: Entry | None = None


class RadixTree:
    """Finds the longest beginning of a text that some entry has, too."""

    def __init__(self) -> None:
        self._root = _Node()

    def find(self, tokens: Sequence[int]) -> tuple[Entry | None, int]:
        """Returns an entry with the longest common beginning, and how many tokens that is."""
        node, done = self._root, 0
        while done < len(tokens):
            child = node.children.get(tokens[done])
            if child is None:
                break
            same = common(child.edge, 0, tokens, done)
            node, done = child, done + same
            if same < len(child.edge):
                break
        return (next(_below(node), None), done) if done else (None, 0)

    def put(self, entry: Entry) -> list[Entry]:
        """Adds an entry; returns those that it makes needless: their texts are its beginnings."""
        node, done, passed = self._root, 0, []
        while done < len(entry.tokens):
            child = node.children.get(entry.tokens[done])
            if child is None:
                child = _Node(entry.tokens[done:])
                node.children[entry.tokens[done]] = child
            same = common(child.edge, 0, entry.tokens, done)
            if same < len(child.edge):
                upper = _Node(child.edge[:same], {child.edge[same]: child})
                child.edge = child.edge[same:]
                node.children[entry.tokens[done]] = child = upper
            node, done = child, done + same
            if node.entry is not None:
                passed.append(node.entry)
        node.entry = entry
        for old in passed:
            if old.tokens != entry.tokens:
                self.remove(old)
        return passed

    def remove(self, entry: Entry) -> None:
        """Takes an entry out; edges that only led to it go, too."""
        path, node, done = [self._root], self._root, 0
        while done < len(entry.tokens):
            node = node.children[entry.tokens[done]]
            path.append(node)
            done += len(node.edge)
        node.entry = None
        while len(path) > 1:
            node, above = path.pop(), path[-1]
            if node.entry is not None or len(node.children) > 1:
                break
            first = node.edge[0]
            if node.children:  # one way on: two edges become one
                (below,) = node.children.values()
                below.edge = node.edge + below.edge
                above.children[first] = below
                break
            del above.children[first]

    def entries(self) -> Iterator[Entry]:
        """Yields all entries."""
        return _below(self._root)


def common(a: Sequence[int], i: int, b: Sequence[int], j: int) -> int:
    """Returns how many tokens of `a` from `i` and of `b` from `j` are the same."""
    most, done, step = min(len(a) - i, len(b) - j), 0, 1024
    while step and done < most:  # slices are compared in C
        some = min(step, most - done)
        if a[i + done : i + done + some] == b[j + done : j + done + some]:
            done += some
        else:
            step = some // 2
    return done


def _below(node: _Node) -> Iterator[Entry]:
    stack = [node]
    while stack:
        node = stack.pop()
        if node.entry is not None:
            yield node.entry
        stack.extend(node.children.values())
