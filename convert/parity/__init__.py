"""Comparison with transformers on tiny models of every family."""
