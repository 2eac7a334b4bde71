"""The common part of the exit step's kernels, in whatever language they are written: sizes, blocks and stages.

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
from jaxtyping import Array, Float

from pallas_kernels import gpu
from pallas_kernels.common import DTYPES, MAX_ELEMENTS, NormKind, power_of_two
from pallas_kernels.exit_step.reference import ExitRows, ExitStep, Gate, Router

MAX_HIDDEN = 256
"""Largest router width for which a program's sums stay in registers."""
MOSAIC_COLUMNS = 64
"""Channels that the Mosaic kernel multiplies at once; one asynchronous copy fetches a row of them."""
_MOSAIC_HIDDEN = 128
_WEIGHT_PARTS = {"bfloat16": 3, "float16": 2}
_SPLIT_NUMBERS = 1 << 14
"""Numbers that fit into the program that sums a row's parts."""


class Problem(NamedTuple):
    """Static properties of a call: x is ``[rows, size]`` of `dtype`; the router has a norm and `hidden` units."""

    rows: int
    size: int
    hidden: int
    dtype: jnp.dtype
    norm: NormKind = "rms"

    @classmethod
    def of(cls, x: Float[Array, "N D"], router: Router, norm: NormKind) -> Problem:
        """The problem for a call's arguments."""
        return cls(x.shape[0], x.shape[1], router.down.shape[1], jnp.dtype(x.dtype), norm)

    @property
    def padded_hidden(self) -> int:
        """Hidden units per block: Triton needs powers of two for blocks, and 16 columns or more for matrix products."""
        return max(16, power_of_two(self.hidden))

    @property
    def mosaic_hidden(self) -> int:
        """Hidden units per block in the Mosaic kernel."""
        return max(64, self.padded_hidden)

    @property
    def weight_parts(self) -> int:
        """Number of 16-bit parts into which float32 router weights are split; 0 multiplies in float32.

        Products of parts with 16-bit states are exact: three parts of bfloat16's 8 bits, or two of float16's 11.
        LayerNorm needs float32, because states minus their mean are float32.
        """
        return 0 if self.norm == "layer" else _WEIGHT_PARTS.get(self.dtype.name, 0)

    @property
    def part_mask(self) -> int:
        """Mask of the bits of a float32 number that its first part keeps."""
        return -1 << (16 if self.dtype == jnp.bfloat16 else 13)

    def refusal(self) -> str | None:
        """Reason why no kernel can take the problem; None if they can."""
        if self.rows == 0:
            return "exit_step: no rows"
        if self.dtype not in DTYPES:
            return f"exit_step: kernels take float32, float16 and bfloat16 rows, not {self.dtype}"
        if self.rows * self.size > MAX_ELEMENTS:
            return f"exit_step: kernels take up to 2^31 numbers, not {self.rows} rows of {self.size}"
        if self.hidden > MAX_HIDDEN:
            return f"exit_step: kernels take routers up to {MAX_HIDDEN} wide, not {self.hidden}"
        return None

    def mosaic_refusal(self, architecture: str) -> str | None:
        """Reason why the Mosaic kernel can't take the problem on a GPU of this compute capability; None if it can."""
        if architecture != "9.0":
            return f"exit_step: 'mosaic_gpu' is for compute capability 9.0 (H100, H200), this GPU has {architecture}"
        if self.norm == "layer":
            return "exit_step: 'mosaic_gpu' has no LayerNorm: states less their mean need products in float32"
        if self.dtype == jnp.float32:
            return "exit_step: 'mosaic_gpu' takes float16 and bfloat16 rows: it would multiply float32 in TF32"
        if self.size % MOSAIC_COLUMNS:
            return f"exit_step: 'mosaic_gpu' takes rows of a multiple of {MOSAIC_COLUMNS} channels, not {self.size}"
        if self.hidden > _MOSAIC_HIDDEN:
            return f"exit_step: 'mosaic_gpu' takes routers up to {_MOSAIC_HIDDEN} wide, not {self.hidden}"
        return self.refusal()


class Blocks(NamedTuple):
    """The grid and its programs.

    Attributes:
      rows: rows per program.
      columns: channels that a program multiplies at once.
      splits: number of programs that share a block of rows, each with its own channels; with 1, the same program also
        decides.
      warps: warps per program.
    """

    rows: int
    columns: int
    splits: int
    warps: int = 4


MEASURED: dict[tuple[str, str, str, int, int], Blocks] = {}
"""The fastest blocks measured on a GPU; empty, because no GPU has been measured.

Keys: architecture, dtype, norm, channels, and number of blocks of 16 rows (a power of two).
"""


def choose_blocks(problem: Problem, device: gpu.Gpu) -> Blocks:
    """The measured blocks, or a guess if there are none."""
    tiles = -(-problem.rows // 16)
    key = (device.architecture, problem.dtype.name, problem.norm, problem.size, power_of_two(tiles))
    return MEASURED.get(key) or _guess_blocks(problem, device)


def _guess_blocks(problem: Problem, device: gpu.Gpu) -> Blocks:
    """Enough programs to keep every multiprocessor busy, with the largest blocks that this and the registers allow.

    With few rows most multiprocessors would be idle, so the channels are split. With many rows the blocks are taller,
    because every program reads the whole router.
    """
    rows, columns, warps = _largest_block(problem)
    if problem.rows < rows * device.multiprocessors:
        rows, warps = 16, 4
    row_blocks, tiles = -(-problem.rows // rows), -(-problem.size // columns)
    # As many splits as there are idle multiprocessors, up to the limit of the summing program, in equal shares.
    wanted = max(1, min(tiles, device.multiprocessors // row_blocks, _SPLIT_NUMBERS // problem.padded_hidden))
    return Blocks(rows, columns, splits=-(-tiles // -(-tiles // wanted)), warps=warps)


def _largest_block(problem: Problem) -> tuple[int, int, int]:
    """Rows, columns and warps for which the compiler has enough registers, on compute capability 8.0 and 9.0."""
    wide = problem.padded_hidden > 128
    if problem.weight_parts == 0:
        return (16 if wide else 32), 32, 4
    return (32, 32, 4) if wide else (64, 64, 8)


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
    def of(cls, problem: Problem, eps: float, blocks: Blocks | None) -> Plan:
        """The plan for a problem; chooses blocks for this process's GPU unless they are given."""
        return cls(problem, blocks or choose_blocks(problem, gpu.current()), eps)

    @property
    def tiles(self) -> int:
        """Number of channel blocks that a program multiplies."""
        return -(-self.problem.size // (self.blocks.columns * self.blocks.splits))

    @property
    def padded_splits(self) -> int:
        """Leading axis of the parts, a power of two; entries from `Blocks.splits` on are never written."""
        return power_of_two(self.blocks.splits)

    def run(self, launch: Launch, x: Float[Array, "N D"], router: Router, gate: Gate, rows: ExitRows) -> ExitStep:
        """Computes the exit step with the kernels that `launch` runs.

        The inputs of a kernel, in this order: x, its mean (one element with "rms") and the padded `down`, or instead of
        these three the two parts; then the padded `down_bias` and `up`, `up_bias`, `threshold`, `layer` and
        `min_layers` (one element each), and the fields of `rows`.
        """
        mean = jnp.mean(x.astype(jnp.float32), axis=1) if self.problem.norm == "layer" else jnp.zeros((1,), jnp.float32)
        inputs: Sequence[Array] = x, mean, self._pad(router.down)
        numbers = (a.astype(jnp.float32).reshape(1) for a in (router.up_bias, gate.threshold))
        counts = (a.astype(jnp.int32).reshape(1) for a in (jnp.int32(gate.layer), gate.min_layers))
        if self.blocks.splits > 1:
            inputs = launch(self._parts(), inputs)
        decision = self._pad(router.down_bias), self._pad(router.up), *numbers, *counts, *rows
        scores, exits, active, exit_layers = launch(self._decision(), (*inputs, *decision))
        return ExitStep(scores, exits, active, exit_layers, jnp.any(exits), jnp.any(active))

    def _pad(self, weights: Float[Array, "... H"]) -> Float[Array, "... K"]:
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
