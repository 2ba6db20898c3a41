"""The OpenAI-compatible server: `redwood serve`.

`run` is the way in; `app` has the routes; `worker` is the one thread that owns the engine. Nothing
here knows how decoding works: it asks the engine for steps and passes them on.
"""
