"""The commands of `redwood`, a file each; `app` joins them, `redwood.cli` runs them.

Modules here import torch and Transformers inside the functions that need them, so that help, usage
errors and the small commands come at once.
"""
