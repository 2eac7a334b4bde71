"""The exit decision: which rows leave the decoder at this checkpoint."""

from pallas_kernels.exit_step.api import ExitStep, exit_step

__all__ = ["ExitStep", "exit_step"]
