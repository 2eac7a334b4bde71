"""The tiny Hugging Face checkpoints of the tests; see `convert.tiny`."""

from __future__ import annotations

from convert.tiny import VOCAB, save_tiny

__all__ = ["VOCAB", "save_tiny"]
