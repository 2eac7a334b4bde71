"""``kv_strategy="propagate"``, one token at a time: rows of skipped layers are projected for several tokens at once.

Projecting a token's keys and values for a layer that it skips (`tide_jax.exits.cache_fill`) reads that layer's key and
value weights: of a small model one part in sixteen of all that the layer would have read, so that a skipped layer is
less than free. Nobody asks for these rows until a later token runs the layer. So the exit states of the newest tokens
are kept in the queue (`tide_jax.exits.queue`), and a group's missing rows are projected in one product when a token is
about to run it, or when the queue is full. They are the rows that projecting at once gives, to rounding.

Only the projection is put off. Layers of tokens that have exited are never run, as `tide_jax.exits.recompute` does.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int, Shaped

from tide_jax.config import layer_groups
from tide_jax.exits.depth import DepthOutput
from tide_jax.exits.gate import ExitGate, Gating, TokenState
from tide_jax.exits.queue import Queue, pending_of
from tide_jax.exits.router import Routers
from tide_jax.exits.walk import Loop, Walk
from tide_jax.model.attention.span import KeyValue
from tide_jax.model.cache import KVCache, Left, Pending
from tide_jax.model.decoder import Decoder
from tide_jax.model.sharding import mesh_of

MOST_ROWS = 8
"""Rows up to which projecting together was measured to be faster on a CPU; of more, many are in one product anyway."""


def is_faster(model: Decoder, rows: int) -> bool:
    """Whether the engine decodes so many rows in this way: on a CPU (others have not been measured), and where it gives
    the same."""
    on_cpu = all(device.platform == "cpu" for device in model.embed.kernel[...].devices())
    return rows <= MOST_ROWS and on_cpu and mesh_of(model) is None and not model.config.length_changes_rope


def deferred_step(
    model: Decoder,
    tokens: Int[Array, "B 1"],
    positions: Int[Array, "B 1"],
    cache: KVCache,
    routers: Routers,
    gate: ExitGate,
    *,
    implementation: str | None = None,
) -> tuple[DepthOutput, KVCache]:
    """Runs the newest token of each row as deep as it needs, and fills in what the layers it runs have missed.

    Args:
      tokens: token ids.
      positions: position of each token in its row, -1 where there is none.
      cache: earlier tokens, with `pending` for the routers' groups and translators.
      routers: routers, exit heads and translators.
      gate: thresholds.
      implementation: of the kernels around an exit, see `pallas_kernels`.

    Returns:
      What the pass gave for the newest token (`new` is zero where it waits), and the cache with the token appended.
    """
    groups = layer_groups(model.config.num_layers, routers.checkpoints)
    queue, code_size = Queue.start(cache, groups, positions), pending_of(cache).code_size
    newest = TokenState.start(model.embed_tokens(tokens, positions), positions, code_size)
    walk = Walk(model, groups, Gating(routers, gate, positions >= 1, implementation), cache, positions)
    return _Deferred(walk, queue.positions).run(newest)


class _Deferred(NamedTuple):
    """A walk down to where the last token exits, with stops to project rows that are missing.

    Attributes:
      walk: of the newest tokens.
      window: positions of the newest Q slots, the tokens' own included.
    """

    walk: Walk
    window: Int[Array, "B Q"]

    def run(self, newest: TokenState) -> tuple[DepthOutput, KVCache]:
        """Groups are run and rows are filled in by turns; where nothing is missing, the first turn is the last."""
        start = self.walk.start(newest), self.walk.cache
        loop, cache = lax.while_loop(lambda c: self._unfinished(*c), lambda c: self._turn(*c), start)
        done = jnp.arange(len(self.walk.groups), dtype=jnp.int32) < loop.group
        before, new = pending_of(cache), self.walk.rows.by_layer(loop.rows)
        executed = jnp.max(loop.state.exit_layers, initial=-1) + 1
        cache = cache._replace(pending=None).append(new, self.window[:, -1:])
        slots = self._slots(loop.state, before)
        assert slots.code is not None
        dtype, ran = before.states.dtype, jnp.where(done, cache.length, before.ran)
        pending = Pending(slots.x.astype(dtype), ran, Left(slots.exit_layers, slots.code.astype(dtype)))
        out = DepthOutput(loop.state.states, loop.state.exit_layers, new, executed)
        return out, cache._replace(pending=pending)

    def _unfinished(self, loop: Loop, cache: KVCache) -> Bool[Array, ""]:
        """Whether a group is to be run, or a step later the queue would not hold what waits."""
        left = loop.group < len(self.walk.groups)
        return left & (self._queue(cache).full | jnp.any(loop.state.active))

    def _turn(self, loop: Loop, cache: KVCache) -> tuple[Loop, KVCache]:
        """Runs groups until a row is missing, and fills in all that are."""
        ran = pending_of(cache).ran

        def ready(s: Loop) -> Bool[Array, ""]:
            return (s.group < len(self.walk.groups)) & jnp.any(s.state.active) & (ran[s.group] == cache.length)

        loop = self.walk._replace(cache=cache).run(loop, ready)
        # A loop of one turn or none, which writes the cache where it is.
        fill = self._unfinished(loop, cache), loop, cache
        return lax.while_loop(lambda c: c[0], lambda c: (jnp.bool_(False), *self._filled(*c[1:])), fill)[1:]

    def _filled(self, loop: Loop, cache: KVCache) -> tuple[Loop, KVCache]:
        """Projects what waits for the groups that are left; of the newest tokens only once they have exited, too."""
        queue, pending, count = self._queue(cache), pending_of(cache), len(self.walk.groups)
        slots = self._slots(loop.state, pending)
        start = self.walk.start(slots)._replace(group=loop.group)
        places, there = self.walk.model.contexts(self.window, None), self.window >= 0
        rows = self.walk.fill(start, places, lambda g: queue.waits(g) & there).rows
        done, gone = jnp.arange(count, dtype=jnp.int32) >= loop.group, ~jnp.any(loop.state.active)
        ran = jnp.where(done, cache.length + gone.astype(jnp.int32), pending.ran)
        cache = queue.filled(self.walk.rows.by_layer(rows), done)._replace(pending=pending._replace(ran=ran))
        own = (done & gone)[:, None, None, None, None, None]
        keys = jnp.where(own, rows.keys[:, :, :, :, -1:], loop.rows.keys)
        values = jnp.where(own, rows.values[:, :, :, :, -1:], loop.rows.values)
        return loop._replace(rows=KeyValue(keys, values)), cache

    def _queue(self, cache: KVCache) -> Queue:
        return Queue(cache, self.walk.groups, self.window)

    def _slots(self, newest: TokenState, pending: Pending) -> TokenState:
        """The queue's tokens as they exited, the newest of each row included."""
        assert pending.left is not None
        assert newest.code is not None
        return newest._replace(
            x=_pushed(pending.states, newest.x),
            code=_pushed(pending.left.code, newest.code),
            exit_layers=_pushed(pending.left.exit_layers, newest.exit_layers),
        )


def _pushed(window: Shaped[Array, "B Q ..."], newest: Shaped[Array, "B 1 ..."]) -> Shaped[Array, "B Q ..."]:
    """The window one slot on."""
    return jnp.concatenate([window[:, 1:].astype(newest.dtype), newest], axis=1)
