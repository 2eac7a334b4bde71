"""Probing: finds out from recorded numbers what a model computes whose type is in no table."""
