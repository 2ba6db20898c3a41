"""The planner: which drafter drafts in this step, and how many nodes, by measured time.

Inside: `planner` (the choice), `arms` (ways to draft, what was learned of each), `budget` (times
of a step and of a level), `ngram_lookahead` (what n-grams would give), `from_profile` (a planner
from what calibration knew). Not here: measuring (profiling, bench). May import: profiling,
drafters and all below.
"""

from redwood.planner.planner import Planner

__all__ = ["Planner"]
