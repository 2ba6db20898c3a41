"""Latency of passes on this machine: measured, modelled, stored.

Inside: `measure` (timing forwards), `latency` (the model of their times), `profile` and `key` (the
file, and what it is valid for). Not here: decisions (planner), acceptance rates (bench). May
import: drafters, backends and all below.
"""
