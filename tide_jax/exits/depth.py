"""Forward pass with exits over any number of tokens: scoring, prefill, and decoding with ``kv_strategy="propagate"``.

With "propagate", the cache rows of skipped layers are projected from exit states at the end of the pass. With
"recompute", every token's keys and values are the full model's, so a pass over several tokens runs every layer, and
exits only select the answer. Decoding one token at a time with "recompute" is `tide_jax.exits.recompute`.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from tide_jax.config import KVStrategy
from tide_jax.exits.exits import Exits
from tide_jax.exits.gate import TokenState
from tide_jax.exits.walk import Walk, anyone_active, groups_of
from tide_jax.model.architecture import check_choice
from tide_jax.model.cache import KVCache
from tide_jax.model.decoder import Decoder
from tide_jax.model.memory import New


class DepthOutput(NamedTuple):
    """Output of a pass with exits.

    Attributes:
      states: final-normed states [B, T, D], the input of the output head.
      exit_layers: index of the last layer each token ran for its answer, int32 [B, T]; -1 for tokens that were not
        active.
      new: what each layer keeps of the tokens: keys and values, or inputs to its state.
      layers_executed: layers the loop ran, int32 scalar: the depth of the deepest token; all layers with "recompute".
    """

    states: Float[Array, "B T D"]
    exit_layers: Int[Array, "B T"]
    new: tuple[New, ...]
    layers_executed: Int[Array, ""]


def run_depth(
    model: Decoder,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    cache: KVCache | None,
    exits: Exits | None = None,
    *,
    may_exit: Bool[Array, "B T"] | None = None,
) -> DepthOutput:
    """Forward pass that runs each token up to its exit.

    Args:
      tokens: token ids.
      positions: position of each token in its row, -1 for padding, which does not run.
      cache: earlier tokens, or None if there are none.
      exits: routers and settings; None runs every layer, in the same loop with exits off. With "propagate" layers are
        skipped and their cache rows projected; with "recompute" all layers run, for exact rows.
      may_exit: tokens that may exit early. The token at position 0 never may: it serves as attention sink
        (Xiao et al. 2023, arXiv:2309.17453), and later tokens depend on its deep keys and values.

    Raises:
      TideError: unknown `exits.kv_strategy`.
    """
    if exits is not None:
        check_choice("kv_strategy", exits.kv_strategy, KVStrategy)
    exact, groups = exits is not None and exits.runs_on, groups_of(model, exits)
    skips = exits is not None and not exact
    # Embed the tokens; those at position 0 never exit.
    code_size = exits.code_size if exits is not None and skips and exits.routers.translators is not None else None
    state = TokenState.start(model, tokens, positions, code_size)
    may_exit = positions >= 1 if may_exit is None else may_exit & (positions >= 1)
    walk, count = Walk(model, groups, exits, may_exit, cache, positions, runs_on=exact), len(groups)
    # Run groups until every token has exited; with "recompute", run all groups for exact cache rows.
    loop = walk.run(walk.start(state), (lambda s: s.group < count) if exact else anyone_active(count))
    executed = walk.rows.layers_before(loop.group)
    # Fill the cache rows of the groups that did not run.
    if skips:
        loop = walk.fill(loop, model.contexts(positions, cache), positions >= 0)
    return DepthOutput(loop.state.states, loop.state.exit_layers, walk.rows.by_layer(loop.rows), executed)


def run_whole(
    model: Decoder, tokens: Int[Array, "B T"], positions: Int[Array, "B T"], cache: KVCache | None
) -> DepthOutput:
    """`run_depth` without exits, for recurrent layers and a pass whose tokens all enter the cache.

    States in `new` have taken in the tokens. `run_depth` returns inputs instead, of which a cache may take in some; it
    would compute what they do to the states a second time.
    """
    x, new = model.run_layers(tokens, positions, cache, advances=True)
    active, layers = positions >= 0, jnp.int32(model.config.num_layers)
    return DepthOutput(
        states=jnp.where(active[:, :, None], model.final_norm(x), jnp.zeros_like(x)),
        exit_layers=jnp.where(active, layers - 1, -1),
        new=new,
        layers_executed=jnp.where(jnp.any(active), layers, 0),
    )
