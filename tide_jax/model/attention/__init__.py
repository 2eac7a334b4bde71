"""Attention, an implementation a file."""
