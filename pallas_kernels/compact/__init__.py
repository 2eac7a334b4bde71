"""Active rows brought together, so that what follows runs on them alone, and put back afterwards."""

from pallas_kernels.compact.api import IMPLEMENTATIONS, gather_rows, partition, scatter_rows
from pallas_kernels.compact.reference import Partition

__all__ = ["IMPLEMENTATIONS", "Partition", "gather_rows", "partition", "scatter_rows"]
