"""SSSD (arXiv 2411.05894): drafts from the text itself, without a model.

The paper keeps a trie of all windows of prompt and output, with counts, and expands the most
probable path first over all match lengths. Here the same tree is made without storing the trie: an
index returns the earlier occurrences of the last 1 to 4 tokens, a trie node *is* its set of
occurrences, and only the nodes that the search pops are made. The counts are the same, depth is not
bounded by a window, and appending a token costs O(4). The second source, the datastore, takes part
in the same search through the same two methods: `matches` and `followers`
(`redwood.datastore.search`). How large a tree a batch allows is `budget_by_batch`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from heapq import heappop, heappush
from typing import NamedTuple, Protocol, TypeAlias

from redwood.errors import ArgumentError, check_count

try:
    from redwood import _native

    _native.TextIndex  # noqa: B018  # an extension built from older sources lacks it
    compiled = True
except (ImportError, AttributeError):
    compiled = False

PROMPT_WEIGHT = 0.6  # weight of the first level, and decay per level by match length: as published
DECAYS = (0.7, 0.8, 0.9, 1.0)
_MOST_PLACES = 128  # per match length, the latest ones
_TOKEN_BITS = 32


class Candidate(NamedTuple):
    """A drafted node: its token, its parent's index (0 is the root) and its path priority."""

    token_id: int
    parent: int
    priority: float


class Source(Protocol):
    """Text to draft from; a place is a position in it, as a number of the source's choice."""

    def matches(self, suffix: Sequence[int]) -> list[tuple[int, list[int]]]:
        """Returns (match length, places), longest first, for tails of `suffix` seen before."""
        ...

    def followers(self, places: Sequence[int]) -> dict[int, list[int]]:
        """Returns the tokens that stood at these places, each with the places behind it."""
        ...


class TextIndex:
    """The occurrences of every n-gram of one sequence, prompt and output. Owned by one request.

    Args:
        token_ids: the prompt.
    """

    def __init__(self, token_ids: Iterable[int] = ()) -> None:
        self._text: list[int] = []
        # By length: the latest place behind an n-gram, and by place the one before it (0: none).
        # Whole numbers alone, which the garbage collector passes over.
        self._latest: list[dict[int, int]] = [{} for _ in DECAYS]
        self._earlier: list[list[int]] = [[0] for _ in DECAYS]
        self.extend(token_ids)

    def __len__(self) -> int:
        return len(self._text)

    def extend(self, token_ids: Iterable[int]) -> None:
        """Appends tokens. O(match lengths) each."""
        text = self._text
        for token in token_ids:
            text.append(token)
            end, key = len(text), 0
            for length, (latest, earlier) in enumerate(
                zip(self._latest, self._earlier, strict=True), start=1
            ):
                if length > end:
                    earlier.append(0)
                    continue
                key = key << _TOKEN_BITS | text[end - length]
                earlier.append(latest.get(key, 0))
                latest[key] = end

    def matches(self, suffix: Sequence[int]) -> list[tuple[int, list[int]]]:
        """Returns (match length, places), longest first, for every tail of `suffix` seen before.

        A place is the index of the token that followed; the end of the text is no place.
        """
        found, key, end = [], 0, len(self._text)
        for length, token in enumerate(reversed(suffix), start=1):
            if length > len(DECAYS):
                break
            key = key << _TOKEN_BITS | token
            place, earlier = self._latest[length - 1].get(key, 0), self._earlier[length - 1]
            places: list[int] = []
            while place and len(places) <= _MOST_PLACES:
                places.append(place)
                place = earlier[place]
            places = [place for place in reversed(places) if place < end]
            if places:
                found.append((length, places))
        return found[::-1]

    def followers(self, places: Sequence[int]) -> dict[int, list[int]]:
        """Returns the tokens that stood at these places, each with the places behind it."""
        grouped: dict[int, list[int]] = {}
        for place in places:
            if place < len(self._text):
                grouped.setdefault(self._text[place], []).append(place + 1)
        return grouped


AnyIndex: TypeAlias = "TextIndex | _native.TextIndex"


def text_index() -> AnyIndex:
    """Returns an empty index: a compiled one, five times as quick, where that was built."""
    return _native.TextIndex() if compiled else TextIndex()


def candidate_tree(
    index: Source,
    suffix: Sequence[int],
    size: int,
    *,
    max_branch: int = 5,
    continuations: Sequence[Sequence[int]] = (),
) -> list[Candidate]:
    """Returns at most `size` - 1 candidates below the root, parents before children.

    Source: arXiv 2411.05894, the candidate tree, with the constants of the released code. Prompt
    and self output: each child x of a matched context enters with priority
    0.6 count(x) / count(context), a further level multiplies by its own share and by 0.7 to 1.0 for
    matches of 1 to 4 tokens. Datastore: all continuations make one trie, a child enters with
    count(x) / count(root), and a further level multiplies by its share alone. The best path first;
    a node that another match length or source brought before is reused and costs nothing.

    Args:
        index: prompt and output.
        suffix: the text's last tokens, the root's included; at most 4 are used.
        size: budget, the root included.
        max_branch: children per node at most.
        continuations: what followed in the datastore, [places][tokens]; one found by two match
            lengths counts twice, as in the released code.
    """

    def own(parent: float, match: int, depth: int, count: int, total: int) -> float:
        # The first level has the weight of its source, each further one the decay of its match.
        weight = PROMPT_WEIGHT if depth == 1 else DECAYS[min(match, len(DECAYS)) - 1]
        return parent * weight * count / total

    def stored(parent: float, match: int, depth: int, count: int, total: int) -> float:
        return parent * count / total

    trie = _Trie(continuations)
    sources = [(index, index.matches(suffix), own), (trie, trie.matches(suffix), stored)]
    return _best_first(sources, size, max_branch)


class _Trie:
    """Continuations as one source: they all follow the same root. A place is (row, depth)."""

    def __init__(self, rows: Sequence[Sequence[int]]) -> None:
        self._rows = rows
        self._width = 1 + max(map(len, rows), default=0)

    def matches(self, suffix: Sequence[int]) -> list[tuple[int, list[int]]]:
        """Returns the root, as a match of one token."""
        return [(1, [i * self._width for i in range(len(self._rows))])] if self._rows else []

    def followers(self, places: Sequence[int]) -> dict[int, list[int]]:
        """Returns the tokens at these places, each with the places behind it."""
        grouped: dict[int, list[int]] = {}
        for place in places:
            row, depth = self._rows[place // self._width], place % self._width
            if depth < len(row):
                grouped.setdefault(row[depth], []).append(place + 1)
        return grouped


_Priority = Callable[[float, int, int, int, int], float]
_Searched = tuple[Source, list[tuple[int, list[int]]], _Priority]


def _best_first(sources: Sequence[_Searched], size: int, max_branch: int) -> list[Candidate]:
    """The best path first, over all sources and match lengths at once.

    Args:
        sources: each with its matches, and the priority of a child from its parent's priority, the
            length of the match, its depth, how often it followed, and how often anything did.
    """
    made: list[Candidate] = []
    known: list[dict[int, int]] = [{}]  # per node: token -> node
    heap: list[tuple[float, int, int, int, int, int, list[int], int]] = []
    order = 0

    def push(
        origin: int, parent: int, depth: int, places: Sequence[int], reached: float, match: int
    ) -> None:
        nonlocal order
        source, _, priority = sources[origin]
        followers = source.followers(places)
        total = sum(map(len, followers.values()))
        for token, behind in followers.items():
            order += 1
            offer = priority(reached, match, depth, len(behind), total)
            # Equal priorities: deeper first, then the order of appearance.
            heappush(heap, (-offer, -depth, order, origin, parent, token, behind, match))

    for origin, (_, found, _) in enumerate(sources if size > 1 else ()):
        for length, places in found:
            push(origin, 0, 1, places, 1.0, length)
    while heap:
        negative, deep, _, origin, parent, token, behind, match = heappop(heap)
        node = known[parent].get(token)
        if node is None:
            if len(known[parent]) >= max_branch:
                continue
            made.append(Candidate(token, parent, -negative))
            if len(made) == size - 1:
                break
            node = known[parent][token] = len(made)
            known.append({})
        push(origin, node, 1 - deep, behind, -negative, match)
    return made


_RATIOS = (16, 32, 48, 64, 96, 128, 160, 192)
_SIZES = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32)


def budget_by_batch(batch: int, flops_per_byte: float) -> int:
    """Returns the nodes of a row, the root included, for a batch of so many rows; 1: no drafts.

    Source: arXiv 2411.05894, the roofline rule s = I / b, with the bounds of the released code: a
    pass stays bound by memory while rows x nodes are below I, the floating-point operations that
    the machine does in the time of a byte (16-bit weights: others move the knee). I is rounded
    down to one of 16 .. 192, small batches are bounded since trees give less than they grow, and
    the result is rounded down to one of 2 .. 32. Ratios below 16 are taken as they are.

    Args:
        batch: rows, 1 or more.
        flops_per_byte: peak operations per second over peak bytes per second.

    Raises:
        ArgumentError: a value out of range.
    """
    check_count("batch", batch)
    if not 0.0 < flops_per_byte < float("inf"):
        raise ArgumentError(f"flops_per_byte {flops_per_byte} must be above 0 and finite")
    ratio = max((r for r in _RATIOS if r <= flops_per_byte), default=int(flops_per_byte))
    if batch == 1:
        bound = 32
    elif batch <= 3:
        bound = 64 // batch
    elif batch <= 6:
        bound = 96 // batch
    else:
        bound = 512 // batch
    limit = min(ratio // batch, bound)
    return max((size for size in _SIZES if size <= limit), default=1)


def tree_bounds(size: int) -> tuple[int, int]:
    """Returns (depth of the drafted part, children of a node) that go with a budget, at most.

    Source: arXiv 2411.05894, the released code's choice for a size, the root included.
    """
    check_count("size", size)
    if size <= 5:
        depth = size - 1
    else:
        depth = next((depth for most, depth in ((8, 5), (32, 6), (48, 8)) if size <= most), 10)
    return depth, min(5, size - 1)
