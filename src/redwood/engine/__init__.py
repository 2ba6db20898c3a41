"""The engine: requests join, decode step by step, and leave.

Inside: `engine` (the step: draft, extend, verify, commit), `drafting` and `verification` (two of
its parts), `request`, `scheduler` (admission, prefill chunks), `turns` (threads), `text`
(prompts and texts around it), `detokenizer`, `stats`, `load` (from names to an engine). Not here:
how drafts are made (drafters), how large they are (planner). May import: planner and all below.
"""

from redwood.engine.engine import RowEngine, Step

__all__ = ["RowEngine", "Step"]
