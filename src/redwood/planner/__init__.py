"""The planner: which drafter drafts in a step, and what tree size, by measured latency.

Inside: `planner` (the choice), `arms` (ways to draft, statistics of each), `budget` (latency of a
step and of a level), `ngram_lookahead` (n-gram trees before the choice), `from_profile` (a planner
from a calibration profile). Not here: measuring (profiling, bench). May import: profiling,
drafters and all below.
"""

from redwood.planner.planner import Planner

__all__ = ["Planner"]
