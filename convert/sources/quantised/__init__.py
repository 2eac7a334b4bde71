"""Readers of checkpoints with quantised weights."""
