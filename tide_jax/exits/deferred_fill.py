"""Decode step of ``kv_strategy="propagate"`` that projects the cache rows of skipped layers for several tokens at once.

Projecting keys and values for a skipped layer (`tide_jax.exits.cache_fill`) reads the layer's key and value weights. In
a small model those are one sixteenth of all the layer's weights, so a skipped layer is not free. Nothing reads these
rows until a later token runs the layer. So the exit states of the newest tokens stay in the queue
(`tide_jax.exits.queue`), and one product projects all missing rows of a group: when a token is about to run the group,
or when the queue is full. The rows equal those of immediate projection, to rounding.

Only the projection is deferred. The skipped layers never run, unlike in `tide_jax.exits.recompute`.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int, Shaped

from tide_jax.exits.depth import DepthOutput
from tide_jax.exits.exits import Exits
from tide_jax.exits.gate import TokenState
from tide_jax.exits.queue import Pending, Queue, QueuedCache
from tide_jax.exits.walk import Loop, Walk, groups_of
from tide_jax.model.decoder import Decoder
from tide_jax.model.sharding import mesh_of

MOST_ROWS = 8
"""Largest batch for which deferring was measured to be faster on a CPU. Larger batches fill a product anyway."""


def is_faster(model: Decoder, rows: int, *, graphs: bool = False) -> bool:
    """Whether the engine defers the projection for a batch of `rows` rows.

    It does for up to `MOST_ROWS` rows, without a mesh, and unless rotary frequencies depend on the length, since
    deferring would then change the result. It does so on a CPU, where that was measured, and on a GPU that runs loops
    as CUDA graphs, where it was not: a skipped layer whose rows are projected at once still reads 4 % of an 8B model's
    layer, and deferring saves most of that. Loops launched from the host would cost more than it saves.

    Args:
      graphs: whether loops run as CUDA graphs (`tide_jax.generation.cuda_graphs`).
    """
    platforms = _platforms(model)
    suits = platforms == {"cpu"} or (graphs and platforms <= {"gpu", "cuda"})
    return rows <= MOST_ROWS and suits and mesh_of(model) is None and not model.config.length_changes_rope


def _platforms(model: Decoder) -> set[str]:
    return {device.platform for device in model.embed.kernel[...].devices()}


def deferred_step(
    model: Decoder,
    tokens: Int[Array, "B 1"],
    positions: Int[Array, "B 1"],
    cache: QueuedCache,
    exits: Exits,
) -> tuple[DepthOutput, QueuedCache]:
    """Decodes one token of each row with exits, projecting missing cache rows of a group before the group runs.

    Args:
      tokens: token ids.
      positions: position of each token in its row, -1 for rows without a token.
      cache: earlier tokens, from `init_cache` for these exits.
      exits: routers and settings.

    Returns:
      The step's output for the newest token (its rows in `new` are zero for groups where it waits), and the cache with
      the token appended.
    """
    groups = groups_of(model, exits)
    queue, code_size = Queue.start(cache, groups, positions), exits.code_size
    newest = TokenState.start(model, tokens, positions, code_size)
    walk = Walk(model, groups, exits, positions >= 1, cache.kv, positions)
    return _DeferredStep(walk, queue.positions).run(newest, cache)


class _DeferredStep(NamedTuple):
    """One decode step: a walk that stops to project missing rows.

    Attributes:
      walk: walk of the newest tokens.
      window: positions of the newest Q slots, the new tokens included.
    """

    walk: Walk
    window: Int[Array, "B Q"]

    def run(self, newest: TokenState, cache: QueuedCache) -> tuple[DepthOutput, QueuedCache]:
        """Alternates between running groups and filling rows; one turn is enough if no row is missing."""
        start = self.walk.start(newest), cache
        loop, cache = lax.while_loop(lambda c: self._has_more(*c), lambda c: self._turn(*c), start)
        # Append the newest token. Its rows are computed where a group ran, projected after a fill, zero where it waits.
        done = jnp.arange(len(self.walk.groups), dtype=jnp.int32) < loop.group
        before, new = cache.pending, self.walk.rows.by_layer(loop.rows)
        executed = jnp.max(loop.state.exit_layers, initial=-1) + 1
        ran = jnp.where(done, cache.kv.length + 1, before.ran)
        there = [ran[g] > cache.kv.length for g, group in enumerate(self.walk.groups) for _ in group]
        kv = cache.kv.append(new, self.window[:, -1:], self.walk.model.layers, counts=there)
        # Push the token's exit state onto the queue, for groups that still have to project its rows.
        slots = self._slots(loop.state, before)
        assert slots.code is not None
        dtype = before.states.dtype
        pending = Pending(slots.x.astype(dtype), ran, slots.exit_layers, slots.code.astype(dtype))
        out = DepthOutput(loop.state.states, loop.state.exit_layers, new, executed)
        return out, QueuedCache(kv, pending)

    def _has_more(self, loop: Loop, cache: QueuedCache) -> Bool[Array, ""]:
        """Whether a token still needs a group, or the queue has to be emptied before the next step."""
        left = loop.group < len(self.walk.groups)
        return left & (self._queue(cache).full | jnp.any(loop.state.active))

    def _turn(self, loop: Loop, cache: QueuedCache) -> tuple[Loop, QueuedCache]:
        """Runs groups up to the first one with missing rows, then fills all missing rows."""
        ran = cache.pending.ran

        def ready(s: Loop) -> Bool[Array, ""]:
            return (s.group < len(self.walk.groups)) & jnp.any(s.state.active) & (ran[s.group] == cache.kv.length)

        loop = self.walk._replace(cache=cache.kv).run(loop, ready)
        # An `if` as a loop of at most one turn: a while loop updates the cache in place, without a copy.
        fill = self._has_more(loop, cache), loop, cache
        return lax.while_loop(lambda c: c[0], lambda c: (jnp.bool_(False), *self._fill(*c[1:])), fill)[1:]

    def _fill(self, loop: Loop, cache: QueuedCache) -> tuple[Loop, QueuedCache]:
        """Projects the waiting rows of the groups that are left.

        The newest tokens are included only once all of them have exited.
        """
        queue, pending, count = self._queue(cache), cache.pending, len(self.walk.groups)
        slots = self._slots(loop.state, pending)
        # Project the exit states of the whole queue for every group from `loop.group` on.
        start = self.walk.start(slots)._replace(group=loop.group)
        places, there = self.walk.model.contexts(self.window, None), self.window >= 0
        rows = self.walk.fill(start, places, lambda g: queue.waiting_slots(g) & there).rows
        # Write the rows of earlier tokens; `ran` counts the new slot too if its token has exited.
        done, gone = jnp.arange(count, dtype=jnp.int32) >= loop.group, ~jnp.any(loop.state.active)
        ran = jnp.where(done, cache.kv.length + gone.astype(jnp.int32), pending.ran)
        kv = queue.write_rows(self.walk.rows.by_layer(rows), done, self.walk.model.layers, own=False)
        cache = QueuedCache(kv, pending._replace(ran=ran))

        # The new slot is appended only at the end of the step: its rows join those of the loop.
        def join(filled: Array, ran: Array) -> Array:
            own = (done & gone).reshape(-1, *(1,) * (ran.ndim - 1))
            return jnp.where(own, lax.slice_in_dim(filled, filled.shape[-2] - 1, None, axis=filled.ndim - 2), ran)

        joined = jax.tree.map(join, rows, loop.rows)
        return loop._replace(rows=joined), cache

    def _queue(self, cache: QueuedCache) -> Queue:
        return Queue(cache, self.walk.groups, self.window)

    def _slots(self, newest: TokenState, pending: Pending) -> TokenState:
        """Exit states of the queue's tokens, with the newest token of each row at the end."""
        assert pending.exit_layers is not None
        assert pending.code is not None
        assert newest.code is not None
        return newest._replace(
            x=_push(pending.states, newest.x),
            code=_push(pending.code, newest.code),
            exit_layers=_push(pending.exit_layers, newest.exit_layers),
        )


def _push(window: Shaped[Array, "B Q ..."], newest: Shaped[Array, "B 1 ..."]) -> Shaped[Array, "B Q ..."]:
    """The window moved one slot on: drops the oldest entry, appends the newest."""
    return jnp.concatenate([window[:, 1:].astype(newest.dtype), newest], axis=1)
