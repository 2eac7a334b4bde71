"""A decoder layer: attention and feed-forward around a residual stream.

The parts branch on configuration flags, never on a family. Kernels keep their natural axes (heads, head channels,
experts) so that a converter can name the slice a source tensor fills and a sharding rule can name the axis it splits.
"""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from tide_jax.architecture import DecoderConfig
from tide_jax.attention import Attention, AttentionContext, KeyValue
from tide_jax.feed_forward import MLP
from tide_jax.latent_attention import LatentAttention
from tide_jax.moe import MoE
from tide_jax.norms import Norm, block_norm


class DecoderLayer(nnx.Module):
    """One decoder layer. Returns the new residual stream and the rows its cache gains."""

    def __init__(self, config: DecoderConfig, index: int, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        self.attention_type = config.attention_pattern[index]
        self.parallel_residual, self.shared_norm = config.parallel_residual, config.shared_norm
        self.norm_after_add = config.norm_placement == "residual"
        self.residual_scale = config.residual_scale
        pre, post = config.norm_placement in ("pre", "sandwich"), config.norm_placement != "pre"

        def norm(wanted: bool) -> Norm | None:
            return block_norm(config, config.hidden_size, dtype=dtype) if wanted else None

        self.pre_attention_norm, self.post_attention_norm = norm(pre), norm(post)
        self.pre_mlp_norm, self.post_mlp_norm = norm(pre and not config.shared_norm), norm(post)
        attention = Attention if config.latent is None else LatentAttention
        self.attention = attention(config, config.attention(index), dtype=dtype, rngs=rngs)
        self.mlp = (MoE if config.has_experts(index) else MLP)(config, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B T D"], contexts: tuple[AttentionContext, ...], cached: KeyValue | None
    ) -> tuple[Float[Array, "B T D"], KeyValue]:
        """Runs the layer on new tokens; returns the new residual stream and the new key and value rows."""
        normed = _apply(self.pre_attention_norm, x)
        attended, new = self.attention(normed, contexts[self.attention_type], cached)
        middle = self._add(x, attended, self.post_attention_norm)
        mlp_input = normed if self.shared_norm else _apply(self.pre_mlp_norm, x if self.parallel_residual else middle)
        return self._add(middle, self.mlp(mlp_input), self.post_mlp_norm), new

    def project_kv(self, x: Float[Array, "B T D"], contexts: tuple[AttentionContext, ...]) -> KeyValue:
        """The key and value rows this layer would store for `x`, without running it."""
        return self.attention.project_kv(_apply(self.pre_attention_norm, x), contexts[self.attention_type])

    def _add(self, x: Array, update: Array, norm: Norm | None) -> Array:
        """Adds a sublayer's output to the residual stream, with the norm that follows either of them."""
        if not self.norm_after_add:
            update = _apply(norm, update)
        if self.residual_scale != 1.0:
            update = update * jnp.asarray(self.residual_scale, update.dtype)
        return _apply(norm, x + update) if self.norm_after_add else x + update


def _apply(norm: Norm | None, x: Array) -> Array:
    return x if norm is None else norm(x)
