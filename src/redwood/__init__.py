"""Redwood: exact tree-based speculative decoding."""
