"""Streaming and seeded sampling: the same seed gives the same text, with or without drafts.

Usage: 02_stream_and_sample.py [MODEL]
"""

import sys

import redwood

model = sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m-instruct"
engine = redwood.load(model, "ngram")
settings = {"max_tokens": 40, "temperature": 0.8, "top_p": 0.95, "seed": 7}

pieces = []
for piece in engine.stream("Once upon a time", **settings):
    print(piece, end="", flush=True)
    pieces.append(piece)
print()
last = pieces[-1]
print(last.finish_reason, last.stats.to_dict()["num_accepted_tokens"], "drafted tokens accepted")

engine.drafter = redwood.NoDrafter()
assert engine.generate("Once upon a time", **settings).text == "".join(pieces)
