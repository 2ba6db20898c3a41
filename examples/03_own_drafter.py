"""A drafter of one's own: three attributes, and it is verified exactly. Usage: 03_... [MODEL]"""

import sys
from collections.abc import Sequence

import redwood
from redwood.drafters.base import Context


class RepeatDrafter:
    """Proposes that the last three tokens come again; wrong guesses cost time, never truth."""

    name = "repeat"
    draws = False  # its nodes are chosen without chance

    def propose(
        self, contexts: Sequence[Context], budgets: Sequence[int]
    ) -> list[redwood.TokenTree]:
        trees = []
        for context, budget in zip(contexts, budgets, strict=True):
            last = context.token_ids[-1]
            trees.append(redwood.TokenTree.chain([last, *context.token_ids[-3:]][:budget]))
        return trees

    def release(self, key: int) -> None:
        pass  # nothing is kept per request


model = sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m-instruct"
engine = redwood.load(model, [RepeatDrafter(), "ngram"])
print(engine.generate("One two three, one two three, one two", max_tokens=24).text)
