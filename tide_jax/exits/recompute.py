"""``kv_strategy="recompute"``: tokens that have exited wait, and their deep layers run together with a later token's.

A token that exits is kept in the queue (`tide_jax.exits.queue`). When a later token runs on past the same exit point,
or the queue is full, the group runs every token that waits for it in one pass over its weights. Keys and values are
then those of the full model, and exits cost nothing but their own answers; what it costs instead is that deep passes
have several rows.

Making up for missing deep keys and values in a later token's pass is EE-LLM's KV recomputation (Chen et al. 2023,
arXiv:2312.04916).
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Int

from tide_jax.config import layer_groups
from tide_jax.exits.depth import DepthOutput
from tide_jax.exits.gate import ExitGate, Gating, TokenState
from tide_jax.exits.queue import Queue
from tide_jax.exits.router import Routers
from tide_jax.exits.walk import Walk
from tide_jax.model.cache import KVCache
from tide_jax.model.decoder import Decoder


def recompute_step(
    model: Decoder,
    tokens: Int[Array, "B 1"],
    positions: Int[Array, "B 1"],
    cache: KVCache,
    routers: Routers,
    gate: ExitGate,
    *,
    implementation: str | None = None,
) -> tuple[DepthOutput, KVCache]:
    """Runs the newest token of each row as deep as it needs, and with it what waits for the layers it runs.

    Rows share the queue: a group that any row needs runs the waiting tokens of all rows, and their newest ones, too.

    Args:
      tokens: token ids.
      positions: position of each token in its row, -1 where there is none.
      cache: earlier tokens, with `pending` for the routers' groups.
      routers: routers and exit heads.
      gate: thresholds.
      implementation: of the kernels around an exit, see `pallas_kernels`.

    Returns:
      What the pass gave for the newest token, `new` with the rows of the newest Q slots (zeros where a layer did not
      run them), and the cache with the tokens appended.
    """
    groups = layer_groups(model.config.num_layers, routers.checkpoints)
    queue, count = Queue.start(cache, groups, positions), len(groups)
    # The queue one slot on: its oldest token has run all layers, or the queue would have been full.
    newest = model.embed_tokens(tokens, positions)
    x = jnp.concatenate([queue.pending.states[:, 1:].astype(newest.dtype), newest], axis=1)
    state = TokenState.start(newest, positions)._replace(x=x)
    gating = Gating(routers, gate, positions >= 1, implementation)
    walk = Walk(model, groups, gating, cache, queue.positions, runs_on=True, queue=queue)
    loop = walk.run(walk.start(state), lambda s: (s.group < count) & (queue.full | jnp.any(s.state.active)))
    new, done = walk.rows.by_layer(loop.rows), jnp.arange(count, dtype=jnp.int32) < loop.group
    out = DepthOutput(loop.state.states, loop.state.exit_layers, new, walk.rows.layers_before(loop.group))
    return out, queue.written(new, done, loop.state.x)
