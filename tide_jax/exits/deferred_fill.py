"""``kv_strategy="propagate"``, one token at a time: rows of skipped layers are projected for several tokens at once.

Projecting a token's keys and values for a layer that it skips (`tide_jax.exits.cache_fill`) reads that layer's key and
value weights: of a small model one part in sixteen of all that the layer would have read, so that a skipped layer is
less than free. Nobody asks for these rows until a later token runs the layer. So the exit states of the newest tokens
are kept (`tide_jax.model.cache.Pending`), and a group's missing rows are projected in one product when a token is about
to run it, or when the queue is full. They are the rows that projecting at once gives, to rounding.

What is put off here is the projection alone; layers of tokens that have left are never run. `tide_jax.exits.recompute`,
which runs them, keeps its tokens in the same window.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Shaped

from tide_jax.config import layer_groups
from tide_jax.exits.cache_fill import fill_rows
from tide_jax.exits.early_exit import DepthOutput, MaskedWalk
from tide_jax.exits.gate import ExitGate, Gating, TokenState
from tide_jax.exits.group_loop import Branch, GroupRows, Loop, run_groups
from tide_jax.exits.router import Routers
from tide_jax.exits.slot_window import SlotWindow
from tide_jax.model.attention.grouped import AttentionContext
from tide_jax.model.attention.span import KeyValue
from tide_jax.model.cache import KVCache, Left, Pending, newest_positions
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
    pending = cache.pending
    assert pending is not None
    newest = TokenState.start(model.embed_tokens(tokens, positions), positions, pending.code_size)
    groups = layer_groups(model.config.num_layers, routers.checkpoints)
    window = jnp.concatenate([newest_positions(cache, pending.queue_length - 1), positions], axis=1)
    walk = _Walk(model, groups, Gating(routers, gate, positions >= 1, implementation), window)
    return walk.run(newest, cache)


class _Walk(NamedTuple):
    """One walk over the layer groups: down to where the last token leaves, with stops to project rows that are missing.

    Attributes:
      model, groups, gating: of the walk.
      window: positions of the newest Q slots, the tokens' own included.
    """

    model: Decoder
    groups: tuple[range, ...]
    gating: Gating
    window: Int[Array, "B Q"]

    def run(self, newest: TokenState, cache: KVCache) -> tuple[DepthOutput, KVCache]:
        """Groups are run and rows are filled in by turns; where nothing is missing, the first turn is the last."""
        start = Loop(jnp.int32(0), newest, self._rows.empty(self.model.config, newest.x))
        loop, cache = lax.while_loop(lambda c: self._unfinished(*c), lambda c: self._turn(*c), (start, cache))
        done = jnp.arange(len(self.groups), dtype=jnp.int32) < loop.group
        before, new = _pending(cache), self._rows.by_layer(loop.rows)
        executed = jnp.max(loop.state.exit_layers, initial=-1) + 1
        cache = cache._replace(pending=None).append(new, self.window[:, -1:])
        states, left = self._left(loop.state, before)
        left = left._replace(code=left.code.astype(before.states.dtype))
        ran = jnp.where(done, cache.length, before.ran)
        cache = cache._replace(pending=Pending(states.astype(before.states.dtype), ran, left))
        return DepthOutput(loop.state.states, loop.state.exit_layers, new, executed), cache

    @property
    def _rows(self) -> GroupRows:
        return GroupRows(self.groups)

    def _unfinished(self, loop: Loop[TokenState], cache: KVCache) -> Bool[Array, ""]:
        """Whether a group is to be run, or a step later the window would not hold what waits."""
        full = SlotWindow(cache, self.groups, self.window, cache.length + 1).full
        return (loop.group < len(self.groups)) & (full | jnp.any(loop.state.active))

    def _turn(self, loop: Loop[TokenState], cache: KVCache) -> tuple[Loop[TokenState], KVCache]:
        """Runs groups until a row is missing, and fills in all that are."""
        positions, ran = self.window[:, -1:], _pending(cache).ran
        walk = MaskedWalk(self.model, self.groups, cache, self.gating, False, positions)
        contexts = self.model.contexts(positions, cache)

        def ready(s: Loop[TokenState]) -> Bool[Array, ""]:
            return (s.group < len(self.groups)) & jnp.any(s.state.active) & (ran[s.group] == cache.length)

        loop = run_groups(ready, [walk.branch(g, contexts) for g in range(len(self.groups))], loop)
        # A loop of one turn or none, which writes the cache where it is.
        fill = self._unfinished(loop, cache), loop, cache
        return lax.while_loop(lambda c: c[0], lambda c: (jnp.bool_(False), *self._filled(*c[1:])), fill)[1:]

    def _filled(self, loop: Loop[TokenState], cache: KVCache) -> tuple[Loop[TokenState], KVCache]:
        """Projects what waits for the groups that are left; of the newest tokens only once they have left, too."""
        slots = SlotWindow(cache, self.groups, self.window, cache.length + 1)
        count, pending = len(self.groups), _pending(cache)
        states, left = self._left(loop.state, pending)
        places = self.model.contexts(self.window, None)
        rows = run_groups(
            lambda s: s.group < count,
            [self._projections(g, slots, left, places) for g in range(count)],
            Loop(loop.group, states, self._rows.empty(self.model.config, states)),
        ).rows
        done, gone = jnp.arange(count, dtype=jnp.int32) >= loop.group, ~jnp.any(loop.state.active)
        ran = jnp.where(done, cache.length + gone.astype(jnp.int32), pending.ran)
        cache = slots.filled(self._rows.by_layer(rows), done)._replace(pending=pending._replace(ran=ran))
        own = (done & gone)[:, None, None, None, None, None]
        keys = jnp.where(own, rows.keys[:, :, :, :, -1:], loop.rows.keys)
        values = jnp.where(own, rows.values[:, :, :, :, -1:], loop.rows.values)
        return loop._replace(rows=KeyValue(keys, values)), cache

    def _projections(
        self, g: int, slots: SlotWindow, left: Left, places: tuple[AttentionContext, ...]
    ) -> Branch[Float[Array, "B Q D"]]:
        """Group `g`'s rows of the window's slots that wait for it."""
        waits = slots.waits(slots.pending.ran[g][None])

        def project(states: Float[Array, "B Q D"]) -> tuple[Float[Array, "B Q D"], KeyValue]:
            rows, wanted = [], waits & (self.window >= 0)
            for i in self.groups[g]:
                x = self.gating.translated(self.model, i, states, left.code, left.exit_layers)
                layer, implementation = self.model.layers[i], self.gating.implementation
                rows.append(fill_rows(layer, x, places, wanted, implementation=implementation))
            return states, self._rows.stack(rows)

        return project

    def _left(self, newest: TokenState, pending: Pending) -> tuple[Float[Array, "B Q D"], Left]:
        """The window's exit states, and how its tokens left."""
        assert pending.left is not None
        assert newest.code is not None
        left = Left(_pushed(pending.left.exit_layers, newest.exit_layers), _pushed(pending.left.code, newest.code))
        return _pushed(pending.states, newest.x), left


def _pending(cache: KVCache) -> Pending:
    assert cache.pending is not None
    return cache.pending


def _pushed(window: Shaped[Array, "B Q ..."], newest: Shaped[Array, "B 1 ..."]) -> Shaped[Array, "B Q ..."]:
    """The window one slot on."""
    return jnp.concatenate([window[:, 1:].astype(newest.dtype), newest], axis=1)
