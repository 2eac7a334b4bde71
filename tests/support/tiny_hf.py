"""The tiny Hugging Face checkpoints of the tests; see `convert.parity.tiny`."""

from __future__ import annotations

from convert.parity.tiny import VOCAB, save_tiny

__all__ = ["VOCAB", "save_tiny"]
