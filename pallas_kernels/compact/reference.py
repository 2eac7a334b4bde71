"""Plain-JAX compaction: the definition that all other implementations are tested against."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Shaped


class Partition(NamedTuple):
    """A stable partition of N rows in each of B batch entries.

    Attributes:
      order: indices of the active rows, then of the others, each in their original order, int32.
      place: the new index of each row, the inverse of `order`, int32.
      kept: number of active rows, int32.
    """

    order: Int[Array, "B N"]
    place: Int[Array, "B N"]
    kept: Int[Array, " B"]


def partition(active: Bool[Array, "B N"]) -> Partition:
    """Moves active rows to the front, with prefix sums instead of a sort."""
    ahead = jnp.cumsum(active, axis=1, dtype=jnp.int32)
    count = ahead[:, -1]
    numbers = jnp.broadcast_to(jnp.arange(active.shape[1], dtype=jnp.int32)[None], active.shape)
    place = jnp.where(active, ahead - 1, numbers - ahead + count[:, None])
    batch = jnp.arange(active.shape[0], dtype=jnp.int32)[:, None]
    order = jnp.zeros_like(place).at[batch, place].set(numbers, unique_indices=True, mode="promise_in_bounds")
    return Partition(order, place, count)


def gather_rows(x: Shaped[Array, "B N D"], rows: Partition, size: int) -> Shaped[Array, "B M D"]:
    """The first `size` rows of the partition, with zeros in place of inactive rows."""
    there = jnp.arange(size, dtype=jnp.int32)[None, :] < rows.kept[:, None]
    found = jnp.take_along_axis(x, rows.order[:, :size, None], axis=1, mode="clip")
    return jnp.where(there[:, :, None], found, jnp.zeros_like(found))


def scatter_rows(
    compacted: Shaped[Array, "B M D"], rows: Partition, out: Shaped[Array, "B N D"]
) -> Shaped[Array, "B N D"]:
    """`out` with its active rows replaced; every output row gathers its own, because a CPU scatters row by row."""
    size = compacted.shape[1]
    there = rows.place < jnp.minimum(rows.kept, jnp.int32(size))[:, None]
    found = jnp.take_along_axis(compacted, jnp.minimum(rows.place, size - 1)[:, :, None], axis=1, mode="clip")
    return jnp.where(there[:, :, None], found.astype(out.dtype), out)
