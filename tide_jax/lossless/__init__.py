"""Lossless decoding: drafts from the text, verified by the full model."""
