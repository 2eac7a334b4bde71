"""The exit decision: which rows exit the decoder at this exit point."""

from pallas_kernels.exit_step.api import IMPLEMENTATIONS, exit_step
from pallas_kernels.exit_step.reference import ExitRows, ExitStep

__all__ = ["IMPLEMENTATIONS", "ExitRows", "ExitStep", "exit_step"]
