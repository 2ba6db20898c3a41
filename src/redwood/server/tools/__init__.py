"""Tool calls: what a model writes, read as calls while it comes; one file for each family's form.

`parts` says what an answer is made of, `parser` what every reader of a form offers, `formats` which
form a model's chat template speaks.
"""
