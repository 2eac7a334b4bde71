"""Lightning attention (Qin et al. 2024, arXiv:2401.04658): linear attention whose heads fade at fixed rates."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from tide_jax.model.norms import Norm
from tide_jax.model.ops import Dense, together
from tide_jax.model.recurrent.linear import Updates
from tide_jax.model.recurrent.mixer import Mixer
from tide_jax.model.recurrent.types import LightningType


class Lightning(Mixer):
    """Values are written under keys and read by queries, without a softmax; a gate multiplies the normed output.

    Inputs to the state: each head's query, key and value after their activation. No convolution: the window is empty.
    """

    def __init__(self, size: int, kind: LightningType, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        self.kind, self.sizes = kind, kind.sizes(size)
        heads = (kind.heads, kind.head_dim)
        self.qkv = Dense((size,), (kind.heads, 3, kind.head_dim), bias=False, dtype=dtype, rngs=rngs)
        self.output_gate = Dense((size,), heads, bias=False, dtype=dtype, rngs=rngs)
        self.norm = Norm(heads, kind="rms", eps=kind.norm_eps, dtype=dtype)
        self.out = Dense(heads, (size,), bias=False, dtype=dtype, rngs=rngs)

    def _project(self, x: Float[Array, "B T D"]) -> tuple[Float[Array, "B T I"], Float[Array, "B T H dv"]]:
        qkv, gate = together(x, [self.qkv, self.output_gate])
        return jax.nn.silu(qkv).reshape(*x.shape[:2], -1), gate

    def _updates(self, inputs: Array, window: Array) -> tuple[Array, Updates]:
        kind, tokens = self.kind, inputs.shape[:2]
        qkv = inputs.astype(jnp.float32).reshape(*tokens, kind.heads, 3, kind.head_dim)
        rates = kind.fade * 2.0 ** (-8.0 * np.arange(1, kind.heads + 1) / kind.heads)
        fade = jnp.broadcast_to(-jnp.asarray(rates, jnp.float32)[None, None], (*tokens, kind.heads))
        updates = Updates(
            queries=qkv[..., 0, :], keys=qkv[..., 1, :], values=qkv[..., 2, :], fade=fade, rate=jnp.ones_like(fade)
        )
        return inputs[..., :0], updates

    def _output(self, read: Array | None, mixed: Array, gate: Array) -> Float[Array, "B T D"]:
        assert read is not None
        return self.out(self.norm(read.astype(gate.dtype)) * jax.nn.sigmoid(gate))
