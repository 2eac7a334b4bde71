"""The common part of the exit step's kernels, in whatever language they are written.

The norm is one factor per row, so it is applied after the down-projection. So each state is read once, while its
squares and its products with the router are summed. With few rows, several programs share the channels of a block of
rows ("parts"), and a second kernel sums the parts ("finish"). With many rows, each program has all channels and decides
itself ("whole"). XLA computes LayerNorm's mean first, which costs one more read of x; subtracting the mean after the
projection would lose digits to cancellation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import gpu
from pallas_kernels.exit_step.config import Blocks, choose_blocks
from pallas_kernels.exit_step.reference import ExitRows, ExitStep, NormKind
from pallas_kernels.exit_step.shapes import Problem, power_of_two


class Stage(NamedTuple):
    """One kernel call.

    Attributes:
      name: the kernel's name.
      grid: number of programs along each axis.
      outputs: shapes and dtypes of its outputs.
      warps: warps per program.
    """

    name: Literal["whole", "parts", "finish"]
    grid: tuple[int, ...]
    outputs: tuple[jax.ShapeDtypeStruct, ...]
    warps: int


Launch = Callable[[Stage, Sequence[Array]], Sequence[Array]]
"""Runs a stage's kernel on its inputs."""


class Plan(NamedTuple):
    """Static part of a call.

    Attributes:
      problem: the call's sizes.
      blocks: the block sizes.
      eps: added to the mean square before the root.
    """

    problem: Problem
    blocks: Blocks
    eps: float

    @classmethod
    def of(
        cls, x: Float[Array, "N D"], down: Float[Array, "D H"], eps: float, norm: NormKind, blocks: Blocks | None
    ) -> Plan:
        """The plan of a call; chooses blocks for this process's GPU unless they are given."""
        problem = Problem.of(x, down, norm)
        return cls(problem, blocks or choose_blocks(problem, gpu.current()), eps)

    @property
    def tiles(self) -> int:
        """Number of channel blocks that a program multiplies."""
        return -(-self.problem.size // (self.blocks.columns * self.blocks.splits))

    @property
    def padded_splits(self) -> int:
        """Leading axis of the parts, a power of two; entries from `Blocks.splits` on are never written."""
        return power_of_two(self.blocks.splits)

    def run(
        self,
        launch: Launch,
        x: Float[Array, "N D"],
        down: Float[Array, "D H"],
        down_bias: Float[Array, " H"],
        up: Float[Array, " H"],
        up_bias: Float[Array, ""],
        threshold: Float[Array, ""],
        rows: ExitRows,
        layer: int,
        min_layers: Int[Array, ""],
    ) -> ExitStep:
        """Computes the exit step with the kernels that `launch` runs.

        The inputs of a kernel, in this order: x, its mean (one element with "rms") and the padded `down`, or instead of
        these three the two parts; then the padded `down_bias` and `up`, `up_bias`, `threshold`, `layer` and
        `min_layers` (one element each), and the fields of `rows`.
        """
        mean = jnp.mean(x.astype(jnp.float32), axis=1) if self.problem.norm == "layer" else jnp.zeros((1,), jnp.float32)
        inputs: Sequence[Array] = x, mean, self._padded(down)
        numbers = (a.astype(jnp.float32).reshape(1) for a in (up_bias, threshold))
        counts = (a.astype(jnp.int32).reshape(1) for a in (jnp.int32(layer), min_layers))
        if self.blocks.splits > 1:
            inputs = launch(self._parts(), inputs)
        decision = self._padded(down_bias), self._padded(up), *numbers, *counts, *rows
        scores, exits, active, exit_layers = launch(self._decision(), (*inputs, *decision))
        return ExitStep(scores, exits, active, exit_layers, jnp.any(exits), jnp.any(active))

    def _padded(self, weights: Float[Array, "... H"]) -> Float[Array, "... K"]:
        """Router weights with zero hidden units, up to a power of two; usually none are needed."""
        missing = self.problem.padded_hidden - self.problem.hidden
        return jnp.pad(weights, [(0, 0)] * (weights.ndim - 1) + [(0, missing)]) if missing else weights

    def _parts(self) -> Stage:
        """Sums of squares ``[splits, N]`` and products ``[splits, N, K]``, each over some of the channels."""
        lead = self.padded_splits, self.problem.rows
        shapes = lead, (*lead, self.problem.padded_hidden)
        outputs = tuple(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)
        return Stage("parts", (self._row_blocks, self.blocks.splits), outputs, self.blocks.warps)

    def _decision(self) -> Stage:
        """All fields of `ExitStep` except the last two.

        Parts are summed by one program per row, which loads all of them at once.
        """
        shape, dtypes = (self.problem.rows,), (jnp.float32, jnp.bool_, jnp.bool_, jnp.int32)
        outputs = tuple(jax.ShapeDtypeStruct(shape, dtype) for dtype in dtypes)
        if self.blocks.splits > 1:
            return Stage("finish", shape, outputs, warps=8)
        return Stage("whole", (self._row_blocks,), outputs, self.blocks.warps)

    @property
    def _row_blocks(self) -> int:
        return -(-self.problem.rows // self.blocks.rows)
