"""Per-token early exit: a masked `lax.while_loop` over layer groups that stops when no token is left.

A group is the layers between two checkpoints. After each group but the last, the checkpoint's router scores every
token still active; tokens above the threshold freeze, and the loop ends as soon as all are frozen, so a group that
nobody needs is never run. Two rules make a skipped group free (measured; see the README's "How it works"):

* each group is a branch of a `lax.switch` over weights of its own: a dynamic slice out of stacked weights would copy
  them at every step;
* the cache is only read inside the loop. Layers return their new key and value rows, the rows of skipped layers are
  filled afterwards by the `kv_strategy`, and the caller writes the cache once.

Deciding per token with a learned router follows TIDE (2026); projecting the cache of skipped layers from the exit
state is CALM's state propagation (Schuster et al. 2022, arXiv:2207.07061, section 3.3), here from the exit state as
translated to each skipped layer (`tide_jax.translators`) where the routers have translators.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.exit_step import exit_step
from tide_jax.attention import AttentionContext, KeyValue
from tide_jax.cache import KVCache
from tide_jax.confidence import second_look
from tide_jax.config import layer_groups
from tide_jax.decoder import Decoder
from tide_jax.router import Routers


class ExitGate(NamedTuple):
    """The dials of the exit decision, as traced values: turning them never recompiles.

    Attributes:
      thresholds: float32 [C], one for each checkpoint.
      min_layers: int32 scalar, layers every token runs.
    """

    thresholds: Float[Array, " C"]
    min_layers: Int[Array, ""]


class DepthOutput(NamedTuple):
    """What a pass with exits returns.

    Attributes:
      states: final-normed states [B, T, D], what the output head reads.
      exit_layers: index of the last layer each token ran, int32 [B, T]; -1 for tokens that were not active.
      new: key and value rows of every layer, ``[L, B, KV, T, channels]``.
      layers_executed: layers the loop ran, int32 scalar: the depth of the deepest token.
    """

    states: Float[Array, "B T D"]
    exit_layers: Int[Array, "B T"]
    new: KeyValue
    layers_executed: Int[Array, ""]


class _Tokens(NamedTuple):
    """Per-token part of the loop's state."""

    x: Float[Array, "B T D"]  # residual stream; frozen at the exit state once a token has left
    states: Float[Array, "B T D"]
    code: Float[Array, "B T R"] | None  # what translators read of the exit state; None without translators
    active: Bool[Array, "B T"]
    exit_layers: Int[Array, "B T"]


class _Loop(NamedTuple):
    group: Int[Array, ""]
    tokens: _Tokens
    rows: KeyValue  # [groups, longest group, B, KV, T, channels]


_Branch = Callable[[_Tokens], tuple[_Tokens, KeyValue]]


def run_depth(
    model: Decoder,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    cache: KVCache | None,
    *,
    routers: Routers | None = None,
    gate: ExitGate | None = None,
    may_exit: Bool[Array, "B T"] | None = None,
    implementation: str | None = None,
) -> DepthOutput:
    """Runs each token as deep as it needs.

    Args:
      tokens: token ids.
      positions: position of each token in its row, -1 for padding, which is not run.
      cache: earlier tokens, or None when there are none.
      routers: routers and exit heads; None runs every layer (the same loop with exits off).
      gate: thresholds, required with `routers`.
      may_exit: tokens allowed to leave early. The token at position 0 never is: it serves as attention sink
        (Xiao et al. 2023, arXiv:2309.17453), and later tokens depend on its deep keys and values.
      implementation: of the exit step, see `pallas_kernels`.
    """
    x = model.embed_tokens(tokens, positions)
    translators = None if routers is None or gate is None else routers.translators
    state = _Tokens(
        x=x,
        states=jnp.zeros_like(x),
        code=None if translators is None else jnp.zeros((*positions.shape, translators.rank), x.dtype),
        active=positions >= 0,
        exit_layers=jnp.full(positions.shape, -1, jnp.int32),
    )
    may_exit = positions >= 1 if may_exit is None else may_exit & (positions >= 1)
    gating = None if routers is None or gate is None else _Gating(routers, gate, may_exit, implementation)
    walk = _Walk(model, layer_groups(model.config.num_layers, routers.checkpoints if routers else ()), cache, gating)
    return walk.run(state, model.contexts(positions, cache))


class _Gating(NamedTuple):
    """Everything the exit decision needs."""

    routers: Routers
    gate: ExitGate
    may_exit: Bool[Array, "B T"]
    implementation: str | None

    def decide(self, model: Decoder, checkpoint: int, state: _Tokens) -> _Tokens:
        """Freezes the tokens that leave at this checkpoint and projects their output states."""
        layer = self.routers.checkpoints[checkpoint]
        allowed = state.active & self.may_exit & (jnp.int32(layer + 1) >= self.gate.min_layers)
        router = self.routers.routers[checkpoint]
        looks, threshold = self.routers.confidence, self.gate.thresholds[checkpoint]
        step = exit_step(
            state.x.reshape(-1, state.x.shape[-1]),
            router.down,
            router.down_bias,
            router.up,
            router.up_bias,
            threshold if looks is None else looks[checkpoint].screen,
            allowed.reshape(-1),
            eps=model.config.norm_eps,
            implementation=self.implementation,
        )
        passed, first = step.exits.reshape(allowed.shape), step.scores.reshape(allowed.shape)

        def leave(state: _Tokens) -> _Tokens:
            answers = second_look(model, self.routers, checkpoint, state.x, first)
            exits = passed & (answers.scores > threshold)
            leaving = exits[:, :, None]
            state = state._replace(states=jnp.where(leaving, answers.states, state.states))
            state = state._replace(active=state.active & ~exits)
            if state.code is None or self.routers.translators is None:
                return state
            code = self.routers.translators.code(checkpoint, state.x, eps=model.config.norm_eps)
            return state._replace(code=jnp.where(leaving, code, state.code))

        return lax.cond(jnp.any(passed), leave, lambda state: state, state)

    def translated(self, model: Decoder, layer: int, state: _Tokens) -> Float[Array, "B T D"]:
        """What a layer reads of tokens that have left."""
        translators = self.routers.translators
        if translators is None or state.code is None:
            return state.x
        number = jnp.searchsorted(jnp.asarray(self.routers.checkpoints, jnp.int32), state.exit_layers)
        return translators.translate(layer, state.x, state.code, number, eps=model.config.norm_eps)


class _Walk(NamedTuple):
    """One pass over the layer groups."""

    model: Decoder
    groups: tuple[range, ...]
    cache: KVCache | None
    gating: _Gating | None

    def run(self, state: _Tokens, contexts: tuple[AttentionContext, ...]) -> DepthOutput:
        count = len(self.groups)
        loop = _Loop(jnp.int32(0), state, self._empty_rows(state.x))
        branches = [self._branch(g, contexts) for g in range(count)]
        loop = _while(lambda s: (s.group < count) & jnp.any(s.tokens.active), branches, loop)
        executed = jnp.asarray([0, *(g.stop for g in self.groups)], jnp.int32)[loop.group]
        if self.gating is not None:
            fill = [self._propagate(g, contexts) for g in range(count)]
            loop = _while(lambda s: s.group < count, fill, loop)
        return DepthOutput(loop.tokens.states, loop.tokens.exit_layers, self._by_layer(loop.rows), executed)

    def _branch(self, g: int, contexts: tuple[AttentionContext, ...]) -> _Branch:
        """Runs group `g`, then decides who leaves. A token that has left keeps its exit state, so that a layer's new
        rows for it are those of state propagation even while other tokens still run the layer."""

        def run(state: _Tokens) -> tuple[_Tokens, KeyValue]:
            rows, active = [], state.active[:, :, None]
            all_active = self.gating is None or active.size == 1  # a lone token is active, or the loop would have ended
            for i in self.groups[g]:
                x = state.x if all_active else jnp.where(active, state.x, self._translated(i, state))
                y, new = self.model.layers[i](x, contexts, self.cache.layer(i) if self.cache is not None else None)
                state = state._replace(x=y if all_active else jnp.where(active, y, state.x))
                rows.append(new)
            last = jnp.int32(self.groups[g].stop - 1)
            state = state._replace(exit_layers=jnp.where(state.active, last, state.exit_layers))
            return self._leave(g, state), self._stack(rows)

        return run

    def _leave(self, g: int, state: _Tokens) -> _Tokens:
        if g < len(self.groups) - 1:
            return state if self.gating is None else self.gating.decide(self.model, g, state)
        out = self.model.final_norm(state.x)
        if self.gating is not None:
            out = jnp.where(state.active[:, :, None], out, state.states)
        return state._replace(states=out, active=jnp.zeros_like(state.active))

    def _propagate(self, g: int, contexts: tuple[AttentionContext, ...]) -> _Branch:
        """`kv_strategy="propagate"`: a skipped layer's keys and values come from the exit state."""

        def fill(state: _Tokens) -> tuple[_Tokens, KeyValue]:
            layers = ((self.model.layers[i], self._translated(i, state)) for i in self.groups[g])
            return state, self._stack([layer.project_kv(x, contexts) for layer, x in layers])

        return fill

    def _translated(self, layer: int, state: _Tokens) -> Float[Array, "B T D"]:
        return state.x if self.gating is None else self.gating.translated(self.model, layer, state)

    def _longest(self) -> int:
        return max(len(group) for group in self.groups)

    def _empty_rows(self, x: Float[Array, "B T D"]) -> KeyValue:
        heads, key_channels, value_channels = self.model.config.cache_shape
        shape = (len(self.groups), self._longest(), x.shape[0], heads, x.shape[1])
        return KeyValue(jnp.zeros((*shape, key_channels), x.dtype), jnp.zeros((*shape, value_channels), x.dtype))

    def _stack(self, rows: list[KeyValue]) -> KeyValue:
        """Stacks a group's rows, padded to the longest group: all branches of a switch return the same shape."""

        def stack(arrays: list[Array]) -> Array:
            return jnp.stack(arrays + [jnp.zeros_like(arrays[0])] * (self._longest() - len(arrays)))

        return KeyValue(stack([r.keys for r in rows]), stack([r.values for r in rows]))

    def _by_layer(self, rows: KeyValue) -> KeyValue:
        """[groups, longest group, ...] -> [layers, ...]."""

        def flatten(a: Array) -> Array:
            return jnp.concatenate([a[g, : len(group)] for g, group in enumerate(self.groups)])

        return KeyValue(flatten(rows.keys), flatten(rows.values))


def _while(condition: Callable[[_Loop], Array], branches: list[_Branch], loop: _Loop) -> _Loop:
    """Runs branches ``loop.group, loop.group + 1, ...`` while the condition holds, collecting their cache rows."""

    def body(s: _Loop) -> _Loop:
        tokens, rows = lax.switch(s.group, branches, s.tokens)
        zeros = (jnp.int32(0),) * rows.keys.ndim
        keys = lax.dynamic_update_slice(s.rows.keys, rows.keys[None], (s.group, *zeros))
        values = lax.dynamic_update_slice(s.rows.values, rows.values[None], (s.group, *zeros))
        return _Loop(s.group + 1, tokens, KeyValue(keys, values))

    return lax.while_loop(condition, body, loop)
