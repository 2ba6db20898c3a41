"""The OpenAI-compatible server: `redwood serve`.

Entry point: `run`. Routes: `app`. `worker` is the one thread that owns the engine. Nothing here
knows how decoding works: the worker asks the engine for steps and passes their tokens on.
"""
