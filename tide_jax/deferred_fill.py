"""``kv_strategy="propagate"``, one token at a time: rows of skipped layers are projected for several tokens at once.

Projecting a token's keys and values for a layer that it skips (`tide_jax.cache_fill`) reads that layer's key and value
weights: of a small model one part in sixteen of all that the layer would have read, so that a skipped layer is less
than free. Nobody asks for these rows until a later token runs the layer. So the exit states of the newest tokens are
kept (`tide_jax.cache.Pending`), and a group's missing rows are projected in one product when a token is about to run
it, or when the queue is full. They are the rows that projecting at once gives, to rounding.

What is put off here is the projection alone; layers of tokens that have left are never run. `tide_jax.recompute`, which
runs them, keeps its tokens in the same window.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from tide_jax.attention import AttentionContext
from tide_jax.cache import KVCache, Left, Pending, newest_positions
from tide_jax.cache_fill import fill_rows
from tide_jax.config import layer_groups
from tide_jax.decoder import Decoder
from tide_jax.early_exit import DepthOutput
from tide_jax.exit_gate import ExitGate, Gating, TokenState, leave
from tide_jax.group_loop import Branch, GroupRows, Loop, behind_zeros, run_groups
from tide_jax.router import Routers
from tide_jax.sharding import mesh_of
from tide_jax.slot_window import SlotWindow
from tide_jax.span_attention import KeyValue

MOST_ROWS = 2
"""Rows up to which a CPU saves more by projecting together than keeping the window costs (measured)."""


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
      What the pass gave for the newest token, `new` with the rows of the newest Q slots (those that waited for
      their group mean something), and the cache with the token appended.
    """
    pending = cache.pending
    assert pending is not None
    width = pending.queue_length
    newest = TokenState.start(model.embed_tokens(tokens, positions), positions, pending.code_size)
    groups = layer_groups(model.config.num_layers, routers.checkpoints)
    slots = SlotWindow(
        cache, groups, jnp.concatenate([newest_positions(cache, width - 1), positions], axis=1), cache.length + 1
    )
    return _Walk(model, slots, Gating(routers, gate, positions >= 1, implementation)).run(newest)


class _Walk(NamedTuple):
    """One walk over the layer groups: down to where the last token leaves, and on where the queue is full."""

    model: Decoder
    slots: SlotWindow
    gating: Gating

    def run(self, newest: TokenState) -> tuple[DepthOutput, KVCache]:
        count, rows = len(self.slots.groups), GroupRows(self.slots.groups)
        contexts = self.model.contexts(self.slots.positions[:, -1:], self.slots.cache)
        branches = [self._alone(g, contexts) for g in range(count)]
        branches += [self._with_waiting(g) for g in range(count)]
        branches += [self._fill(g) for g in range(count)]
        loop = run_groups(
            lambda s: (s.group < count) & (self.slots.full | jnp.any(s.state.active)),
            branches,
            Loop(jnp.int32(0), newest, rows.empty(self.model.config, self._states(newest))),
            choose=lambda s: s.group + count * self._kind(s),
        )
        new, newest = rows.by_layer(loop.rows), loop.state
        executed = jnp.max(newest.exit_layers, initial=-1) + 1
        left = Left(self._exit_layers(newest), self._codes(newest).astype(self.slots.pending.states.dtype))
        states = self._states(newest).astype(self.slots.pending.states.dtype)
        pending = Pending(states, self.slots.pending.ran, left)
        written = self.slots.written(new, jnp.arange(count) < loop.group, pending)
        return DepthOutput(newest.states, newest.exit_layers, new, executed), written

    def _kind(self, loop: Loop[TokenState]) -> Int[Array, ""]:
        """0: nothing waits for the group; 1: something does; 2: nobody runs it, but the queue is full."""
        waiting = self.slots.length - 1 > self.slots.pending.ran[loop.group]
        return jnp.where(jnp.any(loop.state.active), waiting.astype(jnp.int32), 2)

    def _alone(self, g: int, contexts: tuple[AttentionContext, ...]) -> Branch[TokenState]:
        """Runs group `g` for the newest token: nothing waits."""

        def run(state: TokenState) -> tuple[TokenState, KeyValue]:
            rows = []
            for i in self.slots.groups[g]:
                y, new = self.model.layers[i](self._read(i, state), contexts, self.slots.cache.layer(i))
                state = _moved(state, y)
                rows.append(new)
            state, own = self._after(g, state, rows)
            return state, behind_zeros(own, self.slots.positions.shape[1])

        return run

    def _with_waiting(self, g: int) -> Branch[TokenState]:
        """Runs group `g` for the newest token, and projects the rows of those that wait beside its own."""

        def run(state: TokenState) -> tuple[TokenState, KeyValue]:
            rows, seen, places = [], jnp.where(self._waits(g), self.slots.positions, -1), self._places()
            contexts = self.model.contexts(seen, self.slots.complete(g), self.slots.positions[:, -1:])
            for i in self.slots.groups[g]:
                x = self._read(i, state)
                rows.append(self._projected(g, i, state, places, x))
                y = self.model.layers[i].run_on(x, rows[-1], contexts, self.slots.cache.layer(i))
                state = _moved(state, y)
            return self._after(g, state, rows)

        return run

    def _fill(self, g: int) -> Branch[TokenState]:
        """Projects the rows of all that wait for group `g`."""

        def fill(state: TokenState) -> tuple[TokenState, KeyValue]:
            places = self._places()
            rows = [self._projected(g, i, state, places) for i in self.slots.groups[g]]
            return state, GroupRows(self.slots.groups).stack(rows)

        return fill

    def _after(self, g: int, state: TokenState, rows: list[KeyValue]) -> tuple[TokenState, KeyValue]:
        state = leave(self.model, self.slots.groups, g, state, self.gating)
        return state, GroupRows(self.slots.groups).stack(rows)

    def _projected(
        self,
        g: int,
        layer: int,
        state: TokenState,
        places: tuple[AttentionContext, ...],
        newest: Float[Array, "B 1 D"] | None = None,
    ) -> KeyValue:
        """A layer's rows of the window's slots; the newest token is seen as `newest`, where it runs the layer."""
        waits, positions = self._waits(g), self.slots.positions
        x = self.gating.translated(self.model, layer, self._states(state), self._codes(state), self._exit_layers(state))
        if newest is not None:
            x = jnp.concatenate([x[:, :-1], newest], axis=1)
        # Slots that do not wait are masked, but what is no number would not be.
        x = jnp.where(waits[:, :, None], x, jnp.zeros_like(x))
        wanted = waits & (positions >= 0)
        return fill_rows(self.model.layers[layer], x, places, wanted, implementation=self.gating.implementation)

    def _read(self, layer: int, state: TokenState) -> Float[Array, "B 1 D"]:
        """What a layer reads of the newest tokens: their residual stream, or of those that have left a translation."""
        if state.active.size == 1:  # a lone token is active, or the group would not run
            return state.x
        left = self.gating.translated(self.model, layer, state.x, state.code, state.exit_layers)
        return jnp.where(state.active[:, :, None], state.x, left)

    def _places(self) -> tuple[AttentionContext, ...]:
        """Where the window's slots are."""
        return self.model.contexts(self.slots.positions, None)

    def _waits(self, g: int) -> Bool[Array, "1 Q"]:
        return self.slots.waits(self.slots.pending.ran[g][None])

    def _states(self, newest: TokenState) -> Float[Array, "B Q D"]:
        """The window's residual streams, the newest token's included."""
        return _pushed(self.slots.pending.states, newest.x)

    def _codes(self, newest: TokenState) -> Float[Array, "B Q R"]:
        assert self.slots.pending.left is not None
        assert newest.code is not None
        return _pushed(self.slots.pending.left.code, newest.code)

    def _exit_layers(self, newest: TokenState) -> Int[Array, "B Q"]:
        assert self.slots.pending.left is not None
        return _pushed(self.slots.pending.left.exit_layers, newest.exit_layers)


def _moved(state: TokenState, x: Float[Array, "B 1 D"]) -> TokenState:
    """The active tokens with another residual stream."""
    return state._replace(x=jnp.where(state.active[:, :, None], x, state.x))


def _pushed(window: Shaped[Array, "B Q ..."], newest: Shaped[Array, "B 1 ..."]) -> Shaped[Array, "B Q ..."]:
    """The window one slot on."""
    return jnp.concatenate([window[:, 1:].astype(newest.dtype), newest], axis=1)
