"""One prompt, answered through token trees, beside plain decoding. Usage: 01_generate.py [MODEL]"""

import sys

import redwood

model = sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m-instruct"
engine = redwood.load(model, "ngram")
text = "The museum opened in 1921 in a former customs house by the old harbour."
question = [{"role": "user", "content": f"Copy the following text word for word.\n\n{text}"}]

tree = engine.generate(question, max_tokens=48)
engine.drafter = redwood.NoDrafter()
plain = engine.generate(question, max_tokens=48)

print(tree.text)
print(f"{tree.stats.mean_acceptance_length:.2f} tokens per target pass")
assert tree.token_ids == plain.token_ids, "speculation never changes the text"
