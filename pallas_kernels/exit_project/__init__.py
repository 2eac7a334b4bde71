"""Exit head and final norm of exiting rows, written into the buffer of output states."""

from pallas_kernels.exit_project.api import IMPLEMENTATIONS, exit_project
from pallas_kernels.exit_project.reference import AffineHead, FinalNorm

__all__ = ["IMPLEMENTATIONS", "AffineHead", "FinalNorm", "exit_project"]
