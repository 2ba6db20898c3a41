"""Inside Transformers: a model you loaded yourself, through trees. Usage: 04_... [FOLDER]"""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

import redwood.hf
from redwood.models import resolve

folder = resolve(sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m-instruct")
model = AutoModelForCausalLM.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
inputs = tokenizer("The sun rises in the east. The sun rises in", return_tensors="pt")

plain = model.generate(**inputs, max_new_tokens=24, do_sample=False)
tree = model.generate(
    **inputs,
    max_new_tokens=24,
    do_sample=False,
    custom_generate=redwood.hf.generate(drafter="ngram"),
)
print(tokenizer.decode(tree[0], skip_special_tokens=True))
assert tree.tolist() == plain.tolist()
