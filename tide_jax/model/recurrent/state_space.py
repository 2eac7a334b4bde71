"""State-space layers of Mamba-2 (Dao & Gu 2024, arXiv:2405.21060)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from tide_jax.model.norms import Norm
from tide_jax.model.ops import Dense, normal, scaled, together
from tide_jax.model.recurrent.linear import Updates
from tide_jax.model.recurrent.mixer import Mixer
from tide_jax.model.recurrent.types import StateSpaceType


class StateSpace(Mixer):
    """An inner stream is written under keys that groups of heads share; the time step decides how much, and fades.

    Inputs to the state: inner stream, keys, queries, and for each head its time step, as projected.
    """

    def __init__(self, size: int, kind: StateSpaceType, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        self.kind, self.sizes = kind, kind.sizes(size)
        inner = kind.heads * kind.head_dim
        channels = inner + 2 * kind.groups * kind.state_size
        self.gate = Dense((size,), (inner,), bias=kind.bias, dtype=dtype, rngs=rngs)
        self.stream = Dense((size,), (channels,), bias=kind.bias, dtype=dtype, rngs=rngs)
        self.step = Dense((size,), (kind.heads,), bias=kind.bias, dtype=dtype, rngs=rngs)
        self.filters = nnx.Param(normal(rngs, (channels, kind.width), kind.width, dtype))
        self.filter_bias = nnx.Param(jnp.zeros((channels,), dtype)) if kind.conv_bias else None
        self.fade = nnx.Param(jnp.zeros((kind.heads,), dtype))
        self.step_bias = nnx.Param(jnp.zeros((kind.heads,), dtype))
        self.passed = nnx.Param(jnp.ones((kind.heads,), dtype))
        shape = (kind.groups, inner // kind.groups)
        norm = Norm(shape, axes=1, kind="rms", eps=kind.norm_eps, dtype=dtype)
        self.norm = None if kind.norm == "none" else norm
        self.out = Dense((inner,), (size,), bias=kind.bias, dtype=dtype, rngs=rngs)

    def _project(self, x: Float[Array, "B T D"]) -> tuple[Float[Array, "B T I"], Float[Array, "B T N"]]:
        gate, stream, step = together(x, [self.gate, self.stream, self.step])
        inputs, scales = jnp.concatenate([stream, step], axis=-1), self.kind.scales
        if set(scales) != {1.0}:
            inputs, gate = (inputs * self._input_scales).astype(x.dtype), scaled(gate, scales[0])
        return inputs, gate

    @property
    def _input_scales(self) -> Float[Array, "1 1 I"]:
        kind = self.kind
        keys = kind.groups * kind.state_size
        sizes = kind.heads * kind.head_dim, keys, keys, kind.heads
        return jnp.asarray(np.repeat(np.asarray(kind.scales[1:], np.float32), sizes))[None, None]

    def _updates(self, inputs: Array, window: Array) -> tuple[Array, Updates]:
        kind, channels = self.kind, self.filters.shape[0]
        mixed = jax.nn.silu(self._convolve(inputs[..., :channels], window))
        inner, keys = kind.heads * kind.head_dim, kind.groups * kind.state_size
        stream, k, q = jnp.split(mixed.astype(jnp.float32), [inner, inner + keys], axis=-1)
        step = jax.nn.softplus(inputs[..., channels:].astype(jnp.float32) + _row(self.step_bias))
        step = jnp.clip(step, *kind.step_limit)
        updates = Updates(
            queries=self._of_heads(q),
            keys=self._of_heads(k),
            values=stream.reshape(*stream.shape[:2], kind.heads, kind.head_dim),
            fade=-jnp.exp(_row(self.fade)) * step,
            rate=step,
        )
        return mixed, updates

    def _of_heads(self, a: Float[Array, "B T K"]) -> Float[Array, "B T H n"]:
        """A copy of each group for each of its heads."""
        grouped = a.reshape(*a.shape[:2], self.kind.groups, self.kind.state_size)
        return jnp.repeat(grouped, self.kind.heads // self.kind.groups, axis=2)

    def _output(self, read: Array | None, mixed: Array, gate: Array) -> Float[Array, "B T D"]:
        assert read is not None
        stream = mixed[..., : gate.shape[-1]].astype(jnp.float32).reshape(read.shape)
        out = (read + stream * _row(self.passed)[..., None]).reshape(gate.shape)
        out, factor = out.astype(gate.dtype).astype(jnp.float32), jax.nn.silu(gate.astype(jnp.float32))
        out = self._normed(out) * factor if self.kind.norm == "before_gate" else self._normed(out * factor)
        return scaled(self.out(out.astype(gate.dtype)), self.kind.output_scale)

    def _normed(self, out: Float[Array, "B T N"]) -> Float[Array, "B T N"]:
        if self.norm is None:
            return out
        return self.norm(out.reshape(*out.shape[:2], self.kind.groups, -1)).reshape(out.shape)


def _row(parameter: nnx.Param) -> Float[Array, "1 1 H"]:
    return parameter[...].astype(jnp.float32)[None, None]
