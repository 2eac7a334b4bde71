"""Sizes that the exit step's kernels support."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.exit_step.reference import NormKind

DTYPES = (jnp.float32, jnp.float16, jnp.bfloat16)
MAX_ELEMENTS = (1 << 31) - 1
"""Largest array that 32-bit offsets can address."""
MAX_HIDDEN = 256
"""Largest router width for which a program's sums stay in registers."""
MOSAIC_COLUMNS = 64
"""Channels that the Mosaic kernel multiplies at once; one asynchronous copy fetches a row of them."""
_MOSAIC_HIDDEN = 128
_PARTS = {"bfloat16": 3, "float16": 2}


class Problem(NamedTuple):
    """Static properties of a call: x is ``[rows, size]`` of `dtype`; the router has a norm and `hidden` units."""

    rows: int
    size: int
    hidden: int
    dtype: jnp.dtype
    norm: NormKind = "rms"

    @classmethod
    def of(cls, x: Float[Array, "N D"], down: Float[Array, "D H"], norm: NormKind) -> Problem:
        """The problem for a call's arguments."""
        return cls(x.shape[0], x.shape[1], down.shape[1], jnp.dtype(x.dtype), norm)

    @property
    def padded_hidden(self) -> int:
        """Hidden units per block: Triton needs powers of two for blocks, and 16 columns or more for matrix products."""
        return max(16, power_of_two(self.hidden))

    @property
    def weight_parts(self) -> int:
        """Number of 16-bit parts into which float32 router weights are split; 0 multiplies in float32.

        Products of parts with 16-bit states are exact: three parts of bfloat16's 8 bits, or two of float16's 11.
        LayerNorm needs float32, because states minus their mean are float32.
        """
        return 0 if self.norm == "layer" else _PARTS.get(self.dtype.name, 0)

    @property
    def part_mask(self) -> int:
        """Mask of the bits of a float32 number that its first part keeps."""
        return -1 << (16 if self.dtype == jnp.bfloat16 else 13)

    def misfit(self) -> str | None:
        """Reason why no kernel can take the problem; None if they can."""
        if self.rows == 0:
            return "exit_step: no rows"
        if self.dtype not in DTYPES:
            return f"exit_step: kernels take float32, float16 and bfloat16 rows, not {self.dtype}"
        if self.hidden > MAX_HIDDEN:
            return f"exit_step: kernels take routers up to {MAX_HIDDEN} wide, not {self.hidden}"
        return None

    @property
    def mosaic_hidden(self) -> int:
        """Hidden units per block in the Mosaic kernel."""
        return max(64, self.padded_hidden)

    def mosaic_misfit(self, architecture: str) -> str | None:
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
        return self.misfit()


def power_of_two(number: int) -> int:
    """The smallest power of two that is at least the positive `number`."""
    return 1 << (number - 1).bit_length()
