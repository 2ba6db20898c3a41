"""Defaults that the library takes and the command line's help states. Imports nothing, so that help
comes at once; an option that was not given is never passed on.
"""


class Loading:
    """Of `redwood.load`."""

    backend = "auto"
    dtype = "auto"
    device = "auto"
    law = "without_replacement"
    max_rows = 64


class Sampling:
    """Of `SamplingParams`."""

    max_tokens = 256
    temperature = 0.0
    top_k = 0
    top_p = 1.0
    min_p = 0.0
    repetition_penalty = 1.0
    presence_penalty = 0.0
    frequency_penalty = 0.0
    verifier = "auto"


class Tuning:
    """Of `redwood tune`: its plan and the settings of its training."""

    max_tokens = 128
    temperature = 0.0
    seed = 0
    distill = 0
    held_out = 0.1
    marked_weight = 0.0
    epochs = 4
    learning_rate = 5e-4
    batch_tokens = 1024
    patience = 2
