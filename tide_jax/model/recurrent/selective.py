"""Selective state-space layers of the first Mamba (Gu & Dao 2023, arXiv:2312.00752)."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float

from tide_jax.model.norms import Norm
from tide_jax.model.ops import Dense, einsum, normal
from tide_jax.model.recurrent.mixer import Mixer
from tide_jax.model.recurrent.order import zero_others
from tide_jax.model.recurrent.types import SelectiveType

_AT_ONCE = 8  # tokens in a turn of the loop


class ChannelUpdates(NamedTuple):
    """What tokens do to each channel's state, float32; a token with a step of zero does nothing.

    Attributes:
      stream: what is written into each channel.
      step: how much of it, and how much the state fades.
      keys, queries: where all channels of a head write and read.
    """

    stream: Float[Array, "B T N"]
    step: Float[Array, "B T N"]
    keys: Float[Array, "B T H S"]
    queries: Float[Array, "B T H S"]

    def only(self, real: Bool[Array, "B T"]) -> ChannelUpdates:
        """The updates of real tokens; the others do nothing."""
        return zero_others(self, real)


class HeadsDense(nnx.Module):
    """A product for each head: ``by_head [H, inputs, outputs]``."""

    def __init__(self, heads: int, inputs: int, outputs: int, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        self.by_head = nnx.Param(normal(rngs, (heads, inputs, outputs), inputs, dtype))

    def __call__(self, x: Float[Array, "B T H N"]) -> Float[Array, "B T H M"]:
        return einsum("bthn,hnm->bthm", x, self.by_head[...])


class Selective(Mixer):
    """Time step, keys and queries are functions of the convolved inner stream, which is also what is written.

    Inputs to the state: the inner stream.
    """

    def __init__(self, size: int, kind: SelectiveType, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        self.kind, self.sizes = kind, kind.sizes(size)
        inner, state = kind.inner, kind.state_size
        parts = kind.step_rank + 2 * state
        self.stream_gate = Dense((size,), (2, inner), bias=kind.bias, stacked=True, dtype=dtype, rngs=rngs)

        def product(inputs: int, outputs: int) -> Dense | HeadsDense:
            if kind.heads is None:
                return Dense((inputs,), (outputs,), bias=False, dtype=dtype, rngs=rngs)
            return HeadsDense(kind.heads, inputs, outputs, dtype=dtype, rngs=rngs)

        channels = inner // (kind.heads or 1)
        self.parts, self.step = product(channels, parts), product(kind.step_rank, channels)
        self.step_bias = nnx.Param(jnp.zeros((inner,), dtype))
        self.filters = nnx.Param(normal(rngs, (inner, kind.width), kind.width, dtype))
        self.filter_bias = nnx.Param(jnp.zeros((inner,), dtype)) if kind.conv_bias else None
        self.fade = nnx.Param(jnp.zeros((inner, state), dtype))
        self.passed = nnx.Param(jnp.ones((inner,), dtype))
        self.out = Dense((inner,), (size,), bias=kind.bias, dtype=dtype, rngs=rngs)

        def norm(channels: int) -> Norm | None:
            scaled = kind.norms == "scaled"
            plain = Norm((channels,), kind="rms", eps=kind.norm_eps, scale=scaled, dtype=dtype)
            return None if kind.norms == "none" else plain

        self.step_norm, self.key_norm, self.query_norm = norm(kind.step_rank), norm(state), norm(state)

    def _project(self, x: Float[Array, "B T D"]) -> tuple[Float[Array, "B T N"], Float[Array, "B T N"]]:
        both = self.stream_gate(x)
        return both[:, :, 0], both[:, :, 1]

    def _updates(self, inputs: Array, window: Array) -> tuple[Array, ChannelUpdates]:
        kind, mixed = self.kind, jax.nn.silu(self._convolve(inputs, window))
        # Each head by itself: [B, T, H, channels].
        heads = kind.heads or 1
        parts = self.parts(mixed if kind.heads is None else mixed.reshape(*mixed.shape[:2], heads, -1))
        parts = parts.reshape(*mixed.shape[:2], heads, -1)
        step, keys, queries = jnp.split(parts, [kind.step_rank, kind.step_rank + kind.state_size], axis=-1)
        if self.step_norm is not None and self.key_norm is not None and self.query_norm is not None:
            step, keys, queries = self.step_norm(step), self.key_norm(keys), self.query_norm(queries)
        step = self.step(step[:, :, 0] if kind.heads is None else step).reshape(mixed.shape)
        step = step.astype(jnp.float32) + self.step_bias[...].astype(jnp.float32)[None, None]
        found = (mixed, jax.nn.softplus(step), keys, queries)
        return mixed, ChannelUpdates(*(a.astype(jnp.float32) for a in found))

    def _run(self, matrix: Array, updates: ChannelUpdates) -> tuple[Array, Array]:
        fade = -jnp.exp(self.fade[...].astype(jnp.float32))[None]

        heads = self.kind.heads or 1

        def by_channel(a: Float[Array, "B H S"]) -> Float[Array, "B _ S"]:
            return a if heads == 1 else jnp.repeat(a, self.kind.inner // heads, axis=1)

        def token(state: Float[Array, "B N S"], one: ChannelUpdates) -> tuple[Array, Array]:
            step, written = one.step[:, :, None], (one.step * one.stream)[:, :, None] * by_channel(one.keys)
            state = state * jnp.exp(fade * step) + written
            return state, jnp.sum(state * by_channel(one.queries), axis=-1)

        by_token = ChannelUpdates(*(jnp.swapaxes(a, 0, 1) for a in updates))
        state, out = lax.scan(token, matrix[..., 0], by_token, unroll=min(_AT_ONCE, by_token.step.shape[0]))
        return jnp.swapaxes(out, 0, 1)[..., None], state[..., None]

    def _output(self, read: Array | None, mixed: Array, gate: Array) -> Float[Array, "B T D"]:
        assert read is not None
        passed = mixed.astype(jnp.float32) * self.passed[...].astype(jnp.float32)[None, None]
        out = (read[..., 0] + passed) * jax.nn.silu(gate.astype(jnp.float32))
        return self.out(out.astype(gate.dtype))
