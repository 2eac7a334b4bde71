"""The order of a row's tokens: a state takes real tokens one after the other, whatever padding lies between them."""

from __future__ import annotations

from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Shaped

T = TypeVar("T")


class TokenOrder(NamedTuple):
    """Where a row's tokens go: real tokens first, in their order, then slots without a token.

    Attributes:
      index: for each place, the slot whose token goes there, int32.
      place: for each slot, its token's place, int32.
      count: real tokens of each row, int32.
    """

    index: Int[Array, "B T"]
    place: Int[Array, "B T"]
    count: Int[Array, " B"]

    @classmethod
    def of(cls, real: Bool[Array, "B T"]) -> TokenOrder:
        """The order of slots, some of which hold a token."""
        if real.shape[1] == 1:
            return cls(first := jnp.zeros(real.shape, jnp.int32), first, real[:, 0].astype(jnp.int32))
        index = jnp.argsort(~real, axis=1, stable=True).astype(jnp.int32)
        place = jnp.argsort(index, axis=1).astype(jnp.int32)
        return cls(index, place, jnp.sum(real, axis=1, dtype=jnp.int32))

    def only_if(self, counts: Bool[Array, ""]) -> TokenOrder:
        """The same order if the tokens count, else one without a real token."""
        return self._replace(count=jnp.where(counts, self.count, 0))

    @property
    def real(self) -> Bool[Array, "B T"]:
        """Whether a place holds a real token."""
        return jnp.arange(self.index.shape[1], dtype=jnp.int32)[None] < self.count[:, None]

    def forth(self, rows: Shaped[Array, "B T ..."]) -> Shaped[Array, "B T ..."]:
        """Brings rows of slots into order."""
        return _take(rows, self.index)

    def back(self, rows: Shaped[Array, "B T ..."]) -> Shaped[Array, "B T ..."]:
        """Brings ordered rows back to their slots."""
        return _take(rows, self.place)


def zero_others(updates: T, real: Bool[Array, "B T"]) -> T:
    """The updates of real tokens, with zeros for the others."""

    def kept(a: Shaped[Array, "B T ..."]) -> Shaped[Array, "B T ..."]:
        return jnp.where(real.reshape(*real.shape, *(1,) * (a.ndim - 2)), a, 0.0)

    return jax.tree.map(kept, updates)


def _take(rows: Shaped[Array, "B T ..."], index: Int[Array, "B T"]) -> Shaped[Array, "B T ..."]:
    if rows.shape[1] == 1:
        return rows
    return jnp.take_along_axis(rows, index.reshape(*index.shape, *(1,) * (rows.ndim - 2)), axis=1)
