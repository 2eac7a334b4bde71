"""Writes a converted directory, complete or not at all."""
