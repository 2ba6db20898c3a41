"""Benchmarks on one machine: drafters side by side, and calibration.

Inside: `interleave` (candidates decode in turns, step by step), `report` (their figures),
`calibrate` with `acceptance`, `curves`, `decoding`, `sizes`, `clocks` (measures a profile),
`choice` and `plot` (read it). Not here: choices at run time (planner). May import: engine and all
below.
"""
