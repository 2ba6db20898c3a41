"""The eager backend: Transformers' own modules with our attention function.

`backend` runs them, `probe` checks at load that a tree's logits are right, `packing` packs linear
layers once for the CPU.
"""
