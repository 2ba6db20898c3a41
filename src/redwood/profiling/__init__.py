"""What passes cost on this machine: measured, modelled, kept in a file.

Inside: `measure` (timing forwards), `latency` (the model of their times), `profile` and `key` (the
file, and what it is valid for). Not here: what is made of it (planner), acceptance (bench). May
import: drafters, backends and all below.
"""
