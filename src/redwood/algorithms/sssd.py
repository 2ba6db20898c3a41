"""SSSD (arXiv 2411.05894): drafts from the text itself, without a model.

The paper keeps a trie of all windows of prompt and output, with counts, and expands the most
probable path first over all match lengths. The same tree is grown here without storing the trie: an
index gives the places where the last 1 to 4 tokens stood before, a trie node *is* its set of
places, and only the nodes that the search pops are made. The counts are the same, depth is not
bounded by a window, and appending a token costs O(4).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from heapq import heappop, heappush
from typing import NamedTuple

from redwood.algorithms.dynamic import ngram_bin

PROMPT_WEIGHT = 0.6  # priority of a whole count, and decay per level by match length: as published
DECAYS = (0.7, 0.8, 0.9, 1.0)
_MOST_PLACES = 128  # per match length; the latest count


class Candidate(NamedTuple):
    """A drafted node: its token, its parent's index (0 is the root) and its path priority.

    `bin` is its `ngram_bin`, -1 with the published priorities.
    """

    token_id: int
    parent: int
    priority: float
    bin: int = -1


class TextIndex:
    """Where every n-gram of one sequence, prompt and output, was seen. Owned by one request.

    Args:
        token_ids: the prompt.
        longest_match: tokens compared at most (4 in the paper).
    """

    def __init__(self, token_ids: Iterable[int] = (), longest_match: int = len(DECAYS)) -> None:
        self._text: list[int] = []
        self._longest = longest_match
        self._places: list[dict[tuple[int, ...], list[int]]] = [{} for _ in range(longest_match)]
        self.extend(token_ids)

    def __len__(self) -> int:
        return len(self._text)

    def extend(self, token_ids: Iterable[int]) -> None:
        """Appends tokens. O(longest_match) each."""
        text = self._text
        for token in token_ids:
            text.append(token)
            end = len(text)
            for length in range(1, min(self._longest, end) + 1):
                gram = tuple(text[end - length :])
                self._places[length - 1].setdefault(gram, []).append(end)

    def matches(self, suffix: Sequence[int]) -> list[tuple[int, list[int]]]:
        """Returns (match length, places), longest first, for every tail of `suffix` seen before.

        A place is the index of the token that followed; the end of the text is no place.
        """
        found = []
        for length in range(min(self._longest, len(suffix)), 0, -1):
            places = self._places[length - 1].get(tuple(suffix[len(suffix) - length :]), ())
            places = [p for p in places[-_MOST_PLACES - 1 :] if p < len(self._text)]
            if places:
                found.append((length, places))
        return found

    def followers(self, places: Sequence[int]) -> dict[int, list[int]]:
        """Returns the tokens that stood at these places, each with the places behind it."""
        grouped: dict[int, list[int]] = {}
        for place in places:
            if place < len(self._text):
                grouped.setdefault(self._text[place], []).append(place + 1)
        return grouped


def candidate_tree(
    index: TextIndex, suffix: Sequence[int], size: int, *, max_branch: int = 5
) -> list[Candidate]:
    """Returns at most `size` - 1 candidates below the root, parents before children.

    Source: arXiv 2411.05894, the candidate tree of prompt and self output: each child x of a
    matched context enters with priority 0.6 count(x) / count(context), a further level multiplies
    by its own share and by 0.7 to 1.0 for matches of 1 to 4 tokens; the best path first, a node
    that another match length brought before is reused and costs nothing.

    Args:
        suffix: the text's last tokens, the root's included; at most `longest_match` are used.
        size: budget, the root included.
        max_branch: children per node at most.
    """

    def priority(parent: float, match: int, depth: int, count: int, total: int) -> _Offer:
        # The first level has the weight of its source, each further one the decay of its match.
        weight = PROMPT_WEIGHT if depth == 1 else DECAYS[min(match, len(DECAYS)) - 1]
        return _Offer(parent * weight * count / total)

    return _best_first(index, suffix, size, max_branch, priority)


def likely_tree(
    index: TextIndex,
    suffix: Sequence[int],
    size: int,
    rates: Sequence[float],
    *,
    max_branch: int = 5,
) -> list[Candidate]:
    """Returns at most `size` - 1 candidates below the root, the most probable paths first.

    As `candidate_tree`, with measured chances in the place of the published priorities: a node's
    priority is its parent's times the rate of its bin, so it estimates the chance of acceptance.

    Args:
        rates: chance of acceptance by `ngram_bin`, given the parent was accepted.
    """
    longest = max((length for length, _ in index.matches(suffix)), default=0)

    def priority(parent: float, match: int, depth: int, count: int, total: int) -> _Offer:
        kind = ngram_bin(match + depth - 1, count, total, longest=match == longest)
        return _Offer(parent * rates[kind], kind)

    return _best_first(index, suffix, size, max_branch, priority)


class _Offer(NamedTuple):
    priority: float
    bin: int = -1


def _best_first(
    index: TextIndex,
    suffix: Sequence[int],
    size: int,
    max_branch: int,
    priority: Callable[[float, int, int, int, int], _Offer],
) -> list[Candidate]:
    """The search of both trees: the best path first, over all match lengths at once.

    Args:
        priority: a child's, and its bin, from its parent's priority, the length of the match, its
            depth, how often it followed, and how often anything did.
    """
    made: list[Candidate] = []
    known: list[dict[int, int]] = [{}]  # per node: token -> node
    heap: list[tuple[float, int, int, int, int, list[int], int, int]] = []
    order = 0

    def push(parent: int, depth: int, places: Sequence[int], reached: float, match: int) -> None:
        nonlocal order
        followers = index.followers(places)
        total = sum(map(len, followers.values()))
        for token, behind in followers.items():
            order += 1
            offer = priority(reached, match, depth, len(behind), total)
            # Equal priorities: deeper first, then the order of appearance.
            entry = (-offer.priority, -depth, order, parent, token, behind, match, offer.bin)
            heappush(heap, entry)

    for length, places in index.matches(suffix):
        push(0, 1, places, 1.0, length)
    while heap and len(made) < size - 1:
        negative, deep, _, parent, token, behind, match, kind = heappop(heap)
        node = known[parent].get(token)
        if node is None:
            if len(known[parent]) >= max_branch:
                continue
            made.append(Candidate(token, parent, -negative, kind))
            node = known[parent][token] = len(made)
            known.append({})
        push(node, 1 - deep, behind, -negative, match)
    return made
