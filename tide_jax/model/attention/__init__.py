"""Attention, one implementation per file."""
