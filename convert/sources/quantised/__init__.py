"""Checkpoints with quantised weights."""
