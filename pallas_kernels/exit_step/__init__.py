"""The exit decision: which rows leave the decoder at this checkpoint."""

from pallas_kernels.exit_step.api import IMPLEMENTATIONS, exit_step
from pallas_kernels.exit_step.reference import ExitRows, ExitStep

__all__ = ["IMPLEMENTATIONS", "ExitRows", "ExitStep", "exit_step"]
