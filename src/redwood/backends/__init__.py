"""Backends: a language model with rows of KV slots. They know no algorithm."""
