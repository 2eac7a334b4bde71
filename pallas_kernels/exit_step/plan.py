"""What the kernels of the exit step have in common, whatever language they are written in.

The norm's factor is one number a row, so it is applied after the down-projection: each state is read once, while its
squares and its products with the router are summed. With few rows, programs share the channels of a row block
("parts") and a second kernel adds the parts up ("finish"); with many, each program has all channels and decides itself
("whole"). LayerNorm's mean comes first, from XLA, and costs one more reading of x: to subtract it after the projection
would cancel digits.
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
      name: of the kernel.
      grid: number of programs along each axis.
      outputs: what it writes.
      warps: warps of a program.
    """

    name: Literal["whole", "parts", "finish"]
    grid: tuple[int, ...]
    outputs: tuple[jax.ShapeDtypeStruct, ...]
    warps: int


Launch = Callable[[Stage, Sequence[Array]], Sequence[Array]]
"""Runs a stage's kernel on its inputs."""


class Plan(NamedTuple):
    """A call's static part.

    Attributes:
      problem: its sizes.
      blocks: how they are cut.
      eps: added to the mean square before the root.
    """

    problem: Problem
    blocks: Blocks
    eps: float

    @classmethod
    def of(
        cls, x: Float[Array, "N D"], down: Float[Array, "D H"], eps: float, norm: NormKind, blocks: Blocks | None
    ) -> Plan:
        """The plan of a call, with the blocks that suit this process's GPU unless they are given."""
        problem = Problem.of(x, down, norm)
        return cls(problem, blocks or choose_blocks(problem, gpu.current()), eps)

    @property
    def tiles(self) -> int:
        """Blocks of channels that a program multiplies."""
        return -(-self.problem.size // (self.blocks.columns * self.blocks.splits))

    @property
    def padded_splits(self) -> int:
        """Leading axis of the parts; nothing is written beyond `Blocks.splits`."""
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
        """The exit step from kernels that take, in this order, x, its mean (of one element with "rms"), the padded
        `down` or the two parts, then the padded `down_bias` and `up`, `up_bias`, `threshold`, `layer` and `min_layers`
        (one element each), and the fields of `rows`."""
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
        """Router weights with hidden units that add nothing, up to a power of two; usually none are missing."""
        missing = self.problem.padded_hidden - self.problem.hidden
        return jnp.pad(weights, [(0, 0)] * (weights.ndim - 1) + [(0, missing)]) if missing else weights

    def _parts(self) -> Stage:
        """Sums of squares ``[splits, N]`` and products ``[splits, N, K]``, each over some of the channels."""
        lead = self.padded_splits, self.problem.rows
        shapes = lead, (*lead, self.problem.padded_hidden)
        outputs = tuple(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)
        return Stage("parts", (self._row_blocks, self.blocks.splits), outputs, self.blocks.warps)

    def _decision(self) -> Stage:
        """The fields of `ExitStep` but the last two. Parts are added up by a program for each row, in one load."""
        shape, dtypes = (self.problem.rows,), (jnp.float32, jnp.bool_, jnp.bool_, jnp.int32)
        outputs = tuple(jax.ShapeDtypeStruct(shape, dtype) for dtype in dtypes)
        if self.blocks.splits > 1:
            return Stage("finish", shape, outputs, warps=8)
        return Stage("whole", (self._row_blocks,), outputs, self.blocks.warps)

    @property
    def _row_blocks(self) -> int:
        return -(-self.problem.rows // self.blocks.rows)
