"""``kv_strategy="recompute"``: tokens that have left wait, and their deep layers run together with a later token's.

The exit state of a token is all that its deep layers need. So a token that leaves is kept in a queue
(`tide_jax.model.cache.Pending`), and when a later token runs on past the same checkpoint, or the queue is full, the
group runs every token that waits for it in one pass over its weights. Keys and values are then those of the full model,
and exits cost nothing but their own answers; what it costs instead is that deep passes have several rows.

Making up for missing deep keys and values in a later token's pass is EE-LLM's KV recomputation (Chen et al. 2023,
arXiv:2312.04916); LayerSkip keeps exit states to verify drafts from (Elhoushi et al. 2024, arXiv:2404.16710).
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from tide_jax.config import layer_groups
from tide_jax.exits.early_exit import DepthOutput
from tide_jax.exits.gate import ExitGate, Gating, TokenState, leave
from tide_jax.exits.group_loop import Branch, GroupRows, Loop, behind_zeros, run_groups
from tide_jax.exits.router import Routers
from tide_jax.exits.slot_window import SlotWindow
from tide_jax.model.attention.grouped import AttentionContext
from tide_jax.model.attention.span import KeyValue
from tide_jax.model.cache import KVCache, newest_positions
from tide_jax.model.decoder import Decoder


def recompute_step(
    model: Decoder,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    cache: KVCache,
    routers: Routers | None,
    gate: ExitGate | None,
    *,
    count: Int[Array, ""] | None = None,
    may_exit: Bool[Array, ""] | bool = True,
    finish: Bool[Array, ""] | bool = False,
    implementation: str | None = None,
) -> tuple[DepthOutput, KVCache]:
    """Runs the newest token of each row as deep as it needs, and with it what waits for the layers it runs.

    Rows share the queue: a group that any row needs runs the waiting tokens of all rows, and their newest ones, too.

    Args:
      tokens: token ids; several are the newest and drafts before it that have run no layer. With what waits they must
        fit the queue.
      positions: position of each token in its row, -1 where there is none.
      cache: earlier tokens, with `pending` for the routers' groups.
      routers: routers and exit heads; None for one group of all layers.
      gate: thresholds, required with `routers`.
      count: the leading columns of `tokens` that are there, 1 to T; all when omitted.
      may_exit: whether the newest token may leave early.
      finish: run every group, whoever needs it.
      implementation: of the kernels around an exit, see `pallas_kernels`.

    Returns:
      What the pass gave for the newest token, `new` with the rows of the newest Q slots (zeros where a layer did not
      run them), and the cache with the tokens appended. Slots that have now run the last group are in its
      ``pending.states`` as the last layer left them.
    """
    pending = cache.pending
    assert pending is not None
    width = pending.queue_length
    embedded = model.embed_tokens(tokens, positions)
    states = jnp.concatenate([pending.states[:, 1:].astype(embedded.dtype), embedded], axis=1)
    places = jnp.concatenate([newest_positions(cache, width - 1), positions], axis=1)
    if count is None:
        added = jnp.int32(tokens.shape[1])
        states, places = states[:, -width:], places[:, -width:]
    else:
        added = count
        states = lax.dynamic_slice_in_dim(states, count - 1, width, axis=1)
        places = lax.dynamic_slice_in_dim(places, count - 1, width, axis=1)
    newest = TokenState.start(states[:, -1:], places[:, -1:])
    allowed = (places[:, -1:] >= 1) & may_exit
    gating = None if routers is None or gate is None else Gating(routers, gate, allowed, implementation)
    groups = layer_groups(model.config.num_layers, routers.checkpoints if routers else ())
    slots = SlotWindow(cache, groups, places, cache.length + added)
    return _Walk(model, slots, gating, finish, scoring=True if may_exit is True else jnp.any(allowed)).run(
        _Window(states, newest)
    )


class _Window(NamedTuple):
    """The newest Q slots, and the last of them as the token that is decoded."""

    states: Float[Array, "B Q D"]
    newest: TokenState


class _Walk(NamedTuple):
    """One walk over the layer groups; `scoring`: whether routers are asked."""

    model: Decoder
    slots: SlotWindow
    gating: Gating | None
    finish: Bool[Array, ""] | bool
    scoring: Bool[Array, ""] | bool

    def run(self, window: _Window) -> tuple[DepthOutput, KVCache]:
        groups = self.slots.groups
        count, rows = len(groups), GroupRows(groups)
        contexts = self.model.contexts(self.slots.positions[:, -1:], self.slots.cache)
        branches = [self._alone(g, contexts) for g in range(count)]
        branches += [self._with_waiting(g, width) for width in self._widths for g in range(count)]
        whole = self.finish | self.slots.full
        loop = run_groups(
            lambda s: (s.group < count) & (whole | jnp.any(s.state.newest.active)),
            branches,
            Loop(jnp.int32(0), window, rows.empty(self.model.config, window.states)),
            choose=lambda s: s.group + count * self._width_number(s.group),
        )
        new, newest, pending = rows.by_layer(loop.rows), loop.state.newest, self.slots.pending
        out = DepthOutput(newest.states, newest.exit_layers, new, rows.layers_before(loop.group))
        pending = pending._replace(states=loop.state.states.astype(pending.states.dtype))
        return out, self.slots.written(new, jnp.arange(count, dtype=jnp.int32) < loop.group, pending)

    @property
    def _widths(self) -> tuple[int, ...]:
        """Slots in a pass with waiting tokens."""
        return pass_widths(self.slots.pending.queue_length)[1:]

    def _width_number(self, group: Int[Array, ""]) -> Int[Array, ""]:
        """0: nothing waits for the group; otherwise one plus the least width that holds what does."""
        return pass_number(self.slots.length - self.slots.pending.ran[group], self.slots.pending.queue_length)

    def _alone(self, g: int, contexts: tuple[AttentionContext, ...]) -> Branch[_Window]:
        """Runs group `g` for the newest token: nothing waits."""

        def run(window: _Window) -> tuple[_Window, KeyValue]:
            return self._after(g, window, *self._layers(g, window.newest.x, contexts))

        return run

    def _with_waiting(self, g: int, width: int) -> Branch[_Window]:
        """Runs group `g` for the newest token and all that wait for it, `width` slots."""

        def run(window: _Window) -> tuple[_Window, KeyValue]:
            waits = self.slots.waits(self.slots.pending.ran[g][None])[:, -width:]
            positions = jnp.where(waits, self.slots.positions[:, -width:], -1)
            contexts = self.model.contexts(positions, self.slots.complete(g))
            before = window.states[:, -width:]
            # Slots that do not wait are masked, but what is no number would not be.
            x, rows = self._layers(g, jnp.where(waits[:, :, None], before, jnp.zeros_like(before)), contexts)
            return self._after(g, window, jnp.where(waits[:, :, None], x, before), rows)

        return run

    def _layers(
        self, g: int, x: Float[Array, "B W D"], contexts: tuple[AttentionContext, ...]
    ) -> tuple[Float[Array, "B W D"], list[KeyValue]]:
        rows = []
        for i in self.slots.groups[g]:
            x, new = self.model.layers[i](x, contexts, self.slots.cache.layer(i))
            rows.append(new)
        return x, rows

    def _after(
        self, g: int, window: _Window, x: Float[Array, "B W D"], rows: list[KeyValue]
    ) -> tuple[_Window, KeyValue]:
        """The window once its last W slots have run group `g`, and the group's rows for all of its slots."""
        newest = self._decided(g, window.newest._replace(x=x[:, -1:]))
        ahead = window.states.shape[1] - x.shape[1]
        states = jnp.concatenate([window.states[:, :ahead], x], axis=1)
        stacked = GroupRows(self.slots.groups).stack(rows)
        return _Window(states, newest), behind_zeros(stacked, window.states.shape[1])

    def _decided(self, g: int, newest: TokenState) -> TokenState:
        """Who leaves."""

        def decided(gating: Gating | None) -> TokenState:
            return leave(self.model, self.slots.groups, g, newest, gating)

        if self.scoring is True or self.gating is None or g == len(self.slots.groups) - 1:
            return decided(self.gating)
        return lax.cond(self.scoring, lambda: decided(self.gating), lambda: decided(None))


def pass_widths(queue_length: int) -> tuple[int, ...]:
    """Slots in the passes that a group is compiled for. Mostly one token waits, and two rows are cheaper than eight."""
    return tuple(sorted({1, min(2, queue_length), queue_length}))


def pass_number(needed: Int[Array, "..."], queue_length: int) -> Int[Array, "..."]:
    """Index into `pass_widths` of the least width that holds so many slots."""
    number = jnp.zeros_like(needed)
    for width in pass_widths(queue_length)[:-1]:
        number += (needed > width).astype(number.dtype)
    return number
