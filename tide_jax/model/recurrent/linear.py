"""Linear recurrences with a matrix for each head: Mamba-2, delta nets, and linear attention.

A head's state S maps keys to values. A token lets it fade, writes its value under its key, and reads it with its query:

    S = exp(fade) S                        fade <= 0
    S = S + key (value - key S) rate       with the delta rule: replaces what the key read before
    S = S + key value rate                 without it
    out = query S

The first is the gated delta rule (Yang et al. 2024, arXiv:2412.06464, section 3.1); the second is Mamba-2's recurrence
(Dao & Gu 2024, arXiv:2405.21060, section 3). In Kimi delta attention (Kimi Team 2025, arXiv:2510.26692, section 3) each
key channel has its own fade. Many tokens run in chunks (sections 3.3 and 6 of the first two): within a chunk, products
of all tokens with all earlier ones; from chunk to chunk, the state.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from tide_jax.model.ops import einsum
from tide_jax.model.recurrent.fades import fade_channels, fade_heads
from tide_jax.model.recurrent.order import zero_others

CHUNK = 64
_BLOCK = 8  # tokens whose system is solved row after row
CHANNEL_CHUNK = 128  # for fades of channels, whose products take more operations and few of each


class Updates(NamedTuple):
    """What tokens do to a state, float32; tokens that do nothing have a `fade` and a `rate` of zero.

    Attributes:
      queries: what reads the state after the token's own write.
      keys, values: what is written.
      fade: logarithm of the factor of the state, for each head or for each key channel.
      rate: factor of what is written.
    """

    queries: Float[Array, "B T H dk"]
    keys: Float[Array, "B T H dk"]
    values: Float[Array, "B T H dv"]
    fade: Float[Array, "B T H"] | Float[Array, "B T H dk"]
    rate: Float[Array, "B T H"]

    def only(self, real: Bool[Array, "B T"]) -> Updates:
        """The updates of real tokens; the others do nothing."""
        return zero_others(self, real)


def run_linear(
    state: Float[Array, "B H dk dv"], updates: Updates, *, delta: bool
) -> tuple[Float[Array, "B T H dv"], Float[Array, "B H dk dv"]]:
    """What each token reads after its own update, and the state after the last token; float32.

    Args:
      state: before the first token.
      delta: whether a write replaces what its key read before.
    """
    batch, tokens = updates.fade.shape[:2]
    if tokens == 1:
        return _step(state, updates, delta)
    size = min(CHUNK, tokens) if updates.fade.ndim == 3 else min(CHANNEL_CHUNK, 1 << (tokens - 1).bit_length())
    count = -(-tokens // size)

    def chunks(a: Float[Array, "B T H ..."]) -> Float[Array, "n B H c ..."]:
        # Tokens that fill up the last chunk do nothing.
        padded = jnp.pad(a, ((0, 0), (0, count * size - tokens), *((0, 0),) * (a.ndim - 2)))
        return jnp.moveaxis(padded.reshape(batch, count, size, *a.shape[2:]), (1, 3), (0, 2))

    def run(state: Array, chunk: Updates) -> tuple[Array, Array]:
        out, state = _chunk(state, chunk, delta)
        return state, out

    state, out = lax.scan(run, state, Updates(*map(chunks, updates)))
    return jnp.moveaxis(out, (0, 2), (1, 3)).reshape(batch, count * size, *out.shape[2:3], -1)[:, :tokens], state


def _step(state: Array, updates: Updates, delta: bool) -> tuple[Array, Array]:
    """One token."""
    queries, keys, values, fade, rate = (a[:, 0] for a in updates)
    factor = jnp.exp(fade)
    state = state * (factor[:, :, None, None] if factor.ndim == 2 else factor[..., None])
    if delta:
        values = values - _read(state, keys)
    state = state + keys[..., None] * (values * rate[..., None])[:, :, None, :]
    return _read(state, queries)[:, None], state


def _read(state: Float[Array, "B H dk dv"], keys: Float[Array, "B H dk"]) -> Float[Array, "B H dv"]:
    """What a vector for each head reads.

    XLA for CPUs takes ten times as long for a sum of products as for a matrix product. XLA for GPUs would transpose the
    state before a matrix product.
    """
    return lax.platform_dependent(
        state,
        keys,
        cpu=lambda state, keys: einsum("bhk,bhkv->bhv", keys, state),
        default=lambda state, keys: jnp.sum(keys[..., None] * state, axis=2),
    )


def _solve(strict: Float[Array, "B H c c"], right: Float[Array, "B H c d"]) -> Float[Array, "B H c d"]:
    """The solution of a triangular system with ones on the diagonal, by blocks of tokens.

    Not `lax.linalg.triangular_solve`: on a CPU, calls of independent layers wait for each other forever (jaxlib 0.10),
    and on a GPU it calls a library, which no CUDA graph can hold.
    """
    size, block = strict.shape[-1], min(_BLOCK, strict.shape[-1])
    more = -size % block
    strict = jnp.pad(strict, ((0, 0), (0, 0), (0, more), (0, more)))
    right = jnp.pad(right, ((0, 0), (0, 0), (0, more), (0, 0)))
    places = [slice(start, start + block) for start in range(0, size, block)]
    # Invert the blocks on the diagonal, all at once, row after row.
    blocks = jnp.stack([strict[:, :, place, place] for place in places], axis=2)
    rows: list[Array] = []
    for r, unit in enumerate(jnp.eye(block, dtype=strict.dtype)):
        row = jnp.broadcast_to(unit, (*blocks.shape[:3], block))
        for earlier, other in enumerate(rows):
            row = row - blocks[..., r, earlier, None] * other
        rows.append(row)
    inverse = jnp.stack(rows, axis=-2)
    # Then solve block after block.
    solved: list[Array] = []
    for i, place in enumerate(places):
        rest = right[:, :, place]
        if solved:
            before = strict[:, :, place, : place.start]
            rest = rest - einsum("bhck,bhkd->bhcd", before, jnp.concatenate(solved, axis=2))
        solved.append(einsum("bhck,bhkd->bhcd", inverse[:, :, i], rest))
    return jnp.concatenate(solved, axis=2)[:, :, :size]


def _chunk(
    state: Float[Array, "B H dk dv"], updates: Updates, delta: bool
) -> tuple[Float[Array, "B H c dv"], Float[Array, "B H dk dv"]]:
    """One chunk; the arrays of `updates` have heads before tokens, too."""
    queries, keys, values, fade, rate = updates
    scaled, written = keys * rate[..., None], values * rate[..., None]
    fade_tokens = fade_heads if fade.ndim == 3 else fade_channels
    faded = fade_tokens([queries, scaled] if delta else [queries], keys, fade)
    if delta:
        # Each write depends on all earlier ones of the chunk: a triangular system (the "UT transform").
        strict = jnp.tril(faded.products[1], -1)
        right = jnp.concatenate([written, scaled * faded.since], axis=-1)
        solved = _solve(strict, right)
        written, reads = solved[..., : values.shape[-1]], solved[..., values.shape[-1] :]
        written = written - einsum("bhck,bhkv->bhcv", reads, state)
    before = einsum("bhck,bhkv->bhcv", queries * faded.since, state)
    out = before + einsum("bhcd,bhdv->bhcv", faded.products[0], written)
    state = state * faded.since[..., -1, :, None] + einsum("bhck,bhcv->bhkv", faded.left, written)
    return out, state
