"""A transformer block that guides a recurrent layer, and reads each token's embedding beside the residual stream."""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from tide_jax.model.architecture import AttentionType, DecoderConfig
from tide_jax.model.attention.grouped import Attention, AttentionContext
from tide_jax.model.attention.span import CachedRows, KeyValue
from tide_jax.model.feed_forward import MLP
from tide_jax.model.norms import block_norm
from tide_jax.model.ops import Dense


class Guide(nnx.Module):
    """Attention and a feed-forward block without residual connections; the output is added to another layer's input.

    This is the attention block of Zamba (Glorioso et al. 2024, arXiv:2405.16712, section 2).
    """

    def __init__(self, config: DecoderConfig, kind: AttentionType, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        d = config.hidden_size
        self.norm = block_norm(config, config.attention_inputs, dtype=dtype)
        self.attention = Attention(config, kind, dtype=dtype, rngs=rngs)
        self.mlp_norm = block_norm(config, d, dtype=dtype)
        self.mlp = MLP(config, dtype=dtype, rngs=rngs)
        self.out = Dense((d,), (d,), bias=False, dtype=dtype, rngs=rngs)

    def __call__(
        self, stream: Float[Array, "B T S"], context: AttentionContext, cached: CachedRows | None
    ) -> tuple[Float[Array, "B T D"], KeyValue]:
        """What is added to the recurrent layer's input, and the new keys and values.

        Args:
          stream: the residual stream and the tokens' embeddings.
        """
        mixed, rows = self.attention(self.norm(stream), context, cached)
        return self.out(self.mlp(self.mlp_norm(mixed))), rows

    def project_kv(self, stream: Float[Array, "B T S"], context: AttentionContext) -> KeyValue:
        """Keys and values of new tokens, without running the block."""
        return self.attention.project_kv(self.norm(stream), context)
