"""Backends: a language model with rows of KV slots. They know no algorithm.

Inside: `base` (the protocol), `load` (from a name to a backend), `rows` (what every backend keeps
of a row), and a folder for each way to compute: `native`, `eager`, `cuda_graph`, `offload`,
`parallel`. May import: models, sampling, tree.
"""
