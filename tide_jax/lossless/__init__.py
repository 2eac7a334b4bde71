"""Lossless decoding: drafts from the text or from the 8-bit twin, verified by the full model."""
