"""Decode step of ``kv_strategy="recompute"``: skipped layers run later, together with a later token.

The queue (`tide_jax.exits.queue`) keeps the states of exited tokens. When a later token runs past the same exit point,
or the queue is full, the group runs all tokens that wait for it in one pass over its weights. Keys and values are then
the full model's, so an exit affects nothing but its own answer. The price: deep passes process several tokens.

Computing missing deep keys and values in a later token's pass is EE-LLM's KV recomputation (Chen et al. 2023,
arXiv:2312.04916).
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Int

from tide_jax.exits.depth import DepthOutput
from tide_jax.exits.exits import Exits
from tide_jax.exits.gate import TokenState
from tide_jax.exits.queue import Queue, QueuedCache
from tide_jax.exits.walk import Walk, groups_of
from tide_jax.model.decoder import Decoder


def recompute_step(
    model: Decoder,
    tokens: Int[Array, "B 1"],
    positions: Int[Array, "B 1"],
    cache: QueuedCache,
    exits: Exits,
) -> tuple[DepthOutput, QueuedCache]:
    """Decodes one token of each row with exits; groups that run also process the tokens waiting for them.

    Rows share the queue: a group that any row needs runs the waiting and the newest tokens of all rows.

    Args:
      tokens: token ids.
      positions: position of each token in its row, -1 for rows without a token.
      cache: earlier tokens, from `init_cache` for these exits.
      exits: routers and settings.

    Returns:
      The step's output for the newest token, and the cache with the tokens appended. `new` has the rows of the newest Q
      slots, zeros where a layer did not run them.
    """
    groups = groups_of(model, exits)
    queue, count = Queue.start(cache, groups, positions), len(groups)
    # Move the queue one slot on. The token that drops out has run all layers: a full queue is emptied in the step
    # before.
    state = TokenState.start(model, tokens, positions)
    x = jnp.concatenate([queue.pending.states[:, 1:].astype(state.x.dtype), state.x], axis=1)
    state = state._replace(x=x)
    # Run groups while a token is active; a full queue runs all of them.
    walk = Walk(model, groups, exits, positions >= 1, cache.kv, queue.positions, runs_on=True, queue=queue)
    loop = walk.run(walk.start(state), lambda s: (s.group < count) & (queue.full | jnp.any(s.state.active)))
    new, done = walk.rows.by_layer(loop.rows), jnp.arange(count, dtype=jnp.int32) < loop.group
    out = DepthOutput(loop.state.states, loop.state.exit_layers, new, walk.rows.layers_before(loop.group))
    return out, queue.write_step(new, done, model.layers, loop.state.x)
