"""Keys and values that a layer stores for tokens it does not run."""

from pallas_kernels.kv_fill.api import IMPLEMENTATIONS, kv_fill
from pallas_kernels.kv_fill.reference import InputNorm, KVRows, Projection, Rotary, Settings

__all__ = ["IMPLEMENTATIONS", "InputNorm", "KVRows", "Projection", "Rotary", "Settings", "kv_fill"]
