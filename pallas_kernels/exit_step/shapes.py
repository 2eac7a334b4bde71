"""Sizes that the kernels of the exit step can take."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.exit_step.reference import NormKind

DTYPES = (jnp.float32, jnp.float16, jnp.bfloat16)
MAX_ELEMENTS = (1 << 31) - 1
"""What 32-bit offsets reach."""
MAX_HIDDEN = 256
"""Router width up to which a program's sums stay in registers."""
MOSAIC_COLUMNS = 64
"""Channels that the Mosaic kernel multiplies at once: a row of them is what one asynchronous copy brings."""
_MOSAIC_HIDDEN = 128
_PARTS = {"bfloat16": 3, "float16": 2}


class Problem(NamedTuple):
    """Static facts of a call: x is ``[rows, size]`` of `dtype`, the router `hidden` wide behind a norm."""

    rows: int
    size: int
    hidden: int
    dtype: jnp.dtype
    norm: NormKind = "rms"

    @classmethod
    def of(cls, x: Float[Array, "N D"], down: Float[Array, "D H"], norm: NormKind) -> Problem:
        """The problem of a call's arguments."""
        return cls(x.shape[0], x.shape[1], down.shape[1], jnp.dtype(x.dtype), norm)

    @property
    def padded_hidden(self) -> int:
        """Columns of a block of hidden units: Triton's blocks are powers of two, its matrix products at least 16."""
        return max(16, power_of_two(self.hidden))

    @property
    def weight_parts(self) -> int:
        """16-bit parts that float32 router weights are cut into for products with 16-bit states, which are then exact:
        three of bfloat16's 8 bits, two of float16's 11. 0 multiplies in float32, as states less their mean need it."""
        return 0 if self.norm == "layer" else _PARTS.get(self.dtype.name, 0)

    @property
    def part_mask(self) -> int:
        """The bits of a float32 number that its first part keeps."""
        return -1 << (16 if self.dtype == jnp.bfloat16 else 13)

    def misfit(self) -> str | None:
        """Why no kernel can take the problem; None where they can."""
        if self.rows == 0:
            return "exit_step: no rows"
        if self.dtype not in DTYPES:
            return f"exit_step: kernels take float32, float16 and bfloat16 rows, not {self.dtype}"
        if self.hidden > MAX_HIDDEN:
            return f"exit_step: kernels take routers up to {MAX_HIDDEN} wide, not {self.hidden}"
        return None

    @property
    def mosaic_hidden(self) -> int:
        """Columns of a block of hidden units in the Mosaic kernel."""
        return max(64, self.padded_hidden)

    def mosaic_misfit(self, architecture: str) -> str | None:
        """Why the Mosaic kernel can't take the problem on a GPU of this compute capability; None where it can."""
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
    """The least power of two that is not below a positive `number`."""
    return 1 << (number - 1).bit_length()
