"""Per-token early exit: a masked `lax.while_loop` over layer groups that stops when no token is left.

A group is the layers between two checkpoints. After each group but the last, the checkpoint's router scores every
token still active; tokens above the threshold freeze, and the loop ends as soon as all are frozen, so a group that
nobody needs is never run (`tide_jax.exits.group_loop` says what makes that free).

Deciding per token with a learned router follows TIDE (2026). This module is the engine's definition, over any number of
tokens, and how one token of each of many rows is decoded with ``kv_strategy="propagate"`` (of few rows, on a CPU:
`tide_jax.exits.deferred_fill`): the cache of skipped layers is projected from the exit state, CALM's state propagation
(Schuster et al. 2022, arXiv:2207.07061, section 3.3), here from the exit state as translated to each skipped layer
(`tide_jax.exits.translators`) where the routers have translators. With "recompute" every token's keys and values are
those of the full model, only later than others' (`tide_jax.exits.recompute`), so over several tokens at once every
layer runs, and exits choose the answer alone.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from tide_jax.config import KVStrategy, layer_groups
from tide_jax.exits.cache_fill import fill_rows
from tide_jax.exits.gate import ExitGate, Gating, TokenState, leave
from tide_jax.exits.group_loop import Branch, GroupRows, Loop, next_group, run_groups
from tide_jax.exits.router import Routers
from tide_jax.exits.survivors import Survivors
from tide_jax.model.architecture import check_choice
from tide_jax.model.attention.grouped import AttentionContext
from tide_jax.model.attention.span import KeyValue
from tide_jax.model.cache import KVCache
from tide_jax.model.decoder import Decoder


class DepthOutput(NamedTuple):
    """What a pass with exits returns.

    Attributes:
      states: final-normed states [B, T, D], what the output head reads.
      exit_layers: index of the last layer each token ran for its answer, int32 [B, T]; -1 for tokens that were not
        active.
      new: key and value rows of every layer, ``[L, B, KV, T, channels]``.
      layers_executed: layers the loop ran, int32 scalar: the depth of the deepest token, or all with "recompute".
    """

    states: Float[Array, "B T D"]
    exit_layers: Int[Array, "B T"]
    new: KeyValue
    layers_executed: Int[Array, ""]


def run_depth(
    model: Decoder,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    cache: KVCache | None,
    *,
    routers: Routers | None = None,
    gate: ExitGate | None = None,
    may_exit: Bool[Array, "B T"] | None = None,
    kv_strategy: KVStrategy = "propagate",
    survivors: bool = False,
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
      kv_strategy: "propagate" skips layers and projects their rows; "recompute" runs them all, for the rows.
      survivors: whether layers run only for the tokens that are left, where many run (`tide_jax.exits.survivors`): the
        same to rounding, and more to compile. Without effect on short rows, without routers, and with "recompute".
      implementation: of the kernels around an exit, see `pallas_kernels`.

    Raises:
      TideError: no such `kv_strategy`.
    """
    check_choice("kv_strategy", kv_strategy, KVStrategy)
    exact = kv_strategy == "recompute"
    translators = None if routers is None or gate is None or exact else routers.translators
    code_size = None if translators is None else translators.rank
    state = TokenState.start(model.embed_tokens(tokens, positions), positions, code_size)
    may_exit = positions >= 1 if may_exit is None else may_exit & (positions >= 1)
    gating = None if routers is None or gate is None else Gating(routers, gate, may_exit, implementation)
    groups = layer_groups(model.config.num_layers, routers.checkpoints if routers else ())
    walk = MaskedWalk(model, groups, cache, gating, exact, positions)
    return walk.run(state, model.contexts(positions, cache), survivors)


class MaskedWalk(NamedTuple):
    """One pass over the layer groups, all tokens at once.

    Attributes:
      model, groups, cache, gating: of the walk; `gating` None without exits.
      exact: tokens that have left go on, for their keys and values.
      positions: of the tokens, -1 for padding.
    """

    model: Decoder
    groups: tuple[range, ...]
    cache: KVCache | None
    gating: Gating | None
    exact: bool
    positions: Int[Array, "B T"]

    def run(self, state: TokenState, contexts: tuple[AttentionContext, ...], survivors: bool) -> DepthOutput:
        """The whole pass; `survivors` as in `run_depth`."""
        count, rows = len(self.groups), GroupRows(self.groups)
        loop = Loop(jnp.int32(0), state, rows.empty(self.model.config, state.x))
        branches, choose = [self.branch(g, contexts) for g in range(count)], next_group
        if survivors and self.gating is not None and not self.exact:
            fewer = Survivors(self.model, self.groups, self.cache, self.gating, self.positions, contexts)
            branches, choose = branches + fewer.branches(), fewer.choose

        def unfinished(s: Loop[TokenState]) -> Bool[Array, ""]:
            return (s.group < count) & (self.exact | jnp.any(s.state.active))

        loop = run_groups(unfinished, branches, loop, choose=choose)
        executed = rows.layers_before(loop.group)
        if self.gating is not None and not self.exact:
            loop = run_groups(lambda s: s.group < count, [self._propagate(g, contexts) for g in range(count)], loop)
        return DepthOutput(loop.state.states, loop.state.exit_layers, rows.by_layer(loop.rows), executed)

    def branch(self, g: int, contexts: tuple[AttentionContext, ...]) -> Branch[TokenState]:
        """Runs group `g`, then decides who leaves. A token that has left keeps its exit state, so that a layer's new
        rows for it are those of state propagation even while other tokens still run the layer."""

        def run(state: TokenState) -> tuple[TokenState, KeyValue]:
            rows, active = [], state.active[:, :, None]
            # A lone token is active, or the loop would have ended.
            everyone = self.gating is None or self.exact or active.size == 1
            for i in self.groups[g]:
                x = state.x if everyone else jnp.where(active, state.x, self._translated(i, state))
                y, new = self.model.layers[i](x, contexts, self.cache.layer(i) if self.cache is not None else None)
                state = state._replace(x=y if everyone else jnp.where(active, y, state.x))
                rows.append(new)
            return leave(self.model, self.groups, g, state, self.gating), GroupRows(self.groups).stack(rows)

        return run

    def _propagate(self, g: int, contexts: tuple[AttentionContext, ...]) -> Branch[TokenState]:
        """`kv_strategy="propagate"`: a skipped layer's keys and values come from the exit state."""

        def fill(state: TokenState) -> tuple[TokenState, KeyValue]:
            rows, implementation = [], None if self.gating is None else self.gating.implementation
            for i in self.groups[g]:
                x, real = self._translated(i, state), self.positions >= 0
                rows.append(fill_rows(self.model.layers[i], x, contexts, real, implementation=implementation))
            return state, GroupRows(self.groups).stack(rows)

        return fill

    def _translated(self, layer: int, state: TokenState) -> Float[Array, "B T D"]:
        if self.gating is None:
            return state.x
        return self.gating.translated(self.model, layer, state.x, state.code, state.exit_layers)
