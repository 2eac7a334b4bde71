"""Gathers active rows into a compact array, so later steps run only on them, and scatters them back."""

from pallas_kernels.compact.api import IMPLEMENTATIONS, gather_rows, partition, scatter_rows
from pallas_kernels.compact.reference import Partition

__all__ = ["IMPLEMENTATIONS", "Partition", "gather_rows", "partition", "scatter_rows"]
