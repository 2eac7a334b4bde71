"""Computes the keys and values that a layer would store for tokens that skip it."""

from pallas_kernels.kv_fill.api import IMPLEMENTATIONS, kv_fill
from pallas_kernels.kv_fill.reference import InputNorm, KVRows, Projection, Rotary, Settings

__all__ = ["IMPLEMENTATIONS", "InputNorm", "KVRows", "Projection", "Rotary", "Settings", "kv_fill"]
