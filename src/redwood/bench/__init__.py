"""Comparisons on one machine: ways of decoding side by side, and calibration.

Inside: `interleave` (candidates step by step in turns), `report` (their figures), `calibrate` with
`acceptance`, `curves`, `decoding`, `sizes`, `clocks` (fills a profile), `choice` and `plot` (what
it means). May import: engine and all below.
"""
