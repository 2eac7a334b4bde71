"""Attention in tiles of some queries and some keys, merged one after the other."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from tide_jax.model.attention.softmax import Attend, Part, empty_part, merge
from tide_jax.model.attention.span import KeyValue, Span
from tide_jax.model.ops import in_order


class Tiles(NamedTuple):
    """Attention of many queries over many keys.

    Attributes:
      part: attention of one tile.
      q: all queries.
      rows, span: all keys and values, their mask and bias.
      filled: number of keys to read, int32 scalar; None for all of them.
      tall, wide: queries and keys of a tile, at most.
      skip: leave out tiles in which no query sees a key.
    """

    part: Attend
    q: Float[Array, "B KV G T hk"]
    rows: KeyValue
    span: Span
    filled: Int[Array, ""] | None
    tall: int
    wide: int
    skip: bool

    def read(self) -> Part:
        """Attention of all queries."""
        queries, tall = self.q.shape[3], self._height
        if tall == queries:
            return self._strip(self.q, self.span)

        def strip(number: Int[Array, ""], whole: Part) -> Part:
            # The last strip overlaps the one before and finds the same for the queries that both have.
            first = jnp.minimum(number * tall, queries - tall)
            found = self._strip(lax.dynamic_slice_in_dim(self.q, first, tall, axis=3), self.span.queries(first, tall))
            update = lax.dynamic_update_slice_in_dim
            return Part(*(update(old, new, first, axis=3) for old, new in zip(whole, found, strict=True)))

        return lax.fori_loop(np.int32(0), np.int32(-(-queries // tall)), strip, self._nothing(queries))

    def _strip(self, q: Float[Array, "B KV G t hk"], span: Span) -> Part:
        """Attention of one strip of queries, tile after tile."""
        keys, wide = self.rows.keys.shape[2], self._width
        if wide == keys:
            return self.part(q, self.rows, span)

        def tile(number: Int[Array, ""], sofar: Part) -> Part:
            start = jnp.minimum(number * wide, keys - wide)
            some = span.slots(start, wide)
            # The last tile overlaps the one before, whose keys must not count twice.
            again = jnp.arange(wide, dtype=jnp.int32) + start < number * wide
            some = some._replace(mask=some.mask & ~again[None, None, :])

            def read(sofar: Part) -> Part:
                rows = KeyValue(*(in_order(a) for a in self.rows.slots(start, wide)))
                return merge(sofar, self.part(q, rows, some))

            return lax.cond(jnp.any(some.mask), read, lambda sofar: sofar, sofar) if self.skip else read(sofar)

        # Loops of a known length can be differentiated backwards.
        count = np.int32(-(-keys // wide)) if self.filled is None else (self.filled + (wide - 1)) // wide
        return lax.fori_loop(np.int32(0), count, tile, self._nothing(q.shape[3]))

    @property
    def _height(self) -> int:
        return min(self.tall, self.q.shape[3])

    @property
    def _width(self) -> int:
        return min(self.wide, self.rows.keys.shape[2])

    def _nothing(self, queries: int) -> Part:
        """The part of no key."""
        q, rows, span = self.q[:, :, :, :1], self.rows.slots(0, 1), self.span.queries(0, 1).slots(0, 1)
        shape = jax.eval_shape(self.part, q, rows, span).mixed.shape
        return empty_part((*shape[:3], queries), shape[-1])
