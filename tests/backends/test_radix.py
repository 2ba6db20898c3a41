import random

from redwood.backends.radix import Entry, RadixTree


def _common(a, b):
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )


def test_random_histories_find_what_a_list_finds():
    for seed in range(200):
        rng, tree, kept = random.Random(seed), RadixTree(), []
        for _ in range(40):
            tokens = [rng.randrange(2) for _ in range(rng.randrange(1, 12))]
            entry, length = tree.find(tokens)
            best = max((_common(tokens, each.tokens) for each in kept), default=0)
            assert length == best
            if best:
                assert _common(entry.tokens, tokens) == best
            if kept and rng.random() < 0.4:
                tree.remove(kept.pop(rng.randrange(len(kept))))
            else:
                new = Entry(0, tokens)
                gone = tree.put(new)
                assert all(tokens[: len(old.tokens)] == old.tokens for old in gone)
                kept = [old for old in kept if old not in gone] + [new]
            assert {id(e) for e in tree.entries()} == {id(e) for e in kept}
