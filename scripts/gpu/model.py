"""A random model in which a token's id decides its depth, for verify_gpu.py.

A token's id has a kind, ``id % kinds``. All tokens of a kind exit at the same exit point, or never. The token's
embedding contains a direction that belongs to the kind and is long enough to remain visible through random layers. The
exit point's router looks for this direction, and for hundreds of other ones with negligible weight. So routers decide
by reading the state, like trained ones, and any mix of depths is a choice of token ids for the same program.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from tide_jax.config import exit_point_layers
from tide_jax.exits.exits import Exits
from tide_jax.exits.router import Router, Routers
from tide_jax.model.architecture import AttentionType, DecoderConfig, RopeConfig
from tide_jax.model.decoder import Decoder, stored_parameters
from tide_jax.testing import tiny_config

_LENGTH, _SEEN, _SHARPNESS = 3.0, 0.4, 20.0
"""Length of a kind's direction, and how much of it a router must see, in units of the root of D."""


def eight_billion_config() -> DecoderConfig:
    """Configuration of a typical model with 8 billion parameters (the shape of Llama 3.1)."""
    return _llama(
        vocab_size=128256,
        hidden_size=4096,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        intermediate_size=14336,
        max_positions=131072,
        theta=500000.0,
    )


def _llama(*, head_dim: int, num_layers: int, theta: float, **sizes: int) -> DecoderConfig:
    """Every layer attends to all tokens before, with rotary positions."""
    kind = AttentionType(scale=head_dim**-0.5, rope=RopeConfig(theta=theta, rotary_dim=head_dim))
    return DecoderConfig(
        model_type="llama",
        head_dim=head_dim,
        num_layers=num_layers,
        attention_types=(kind,),
        layer_pattern=(0,) * num_layers,
        **sizes,
    )


def config_8b() -> DecoderConfig:
    """The shape of Llama 3 8B with a separate output head, which steering must not affect."""
    return dataclasses.replace(eight_billion_config(), tie_embeddings=False, norm_eps=1e-5)


def config_smollm2() -> DecoderConfig:
    """The shape of SmolLM2-135M."""
    return _llama(
        vocab_size=49152,
        hidden_size=576,
        num_layers=30,
        num_heads=9,
        num_kv_heads=3,
        head_dim=64,
        intermediate_size=1536,
        max_positions=8192,
        theta=100000.0,
    )


def config_tiny() -> DecoderConfig:
    """A shape that a processor runs quickly."""
    kind = AttentionType(scale=16**-0.5, rope=RopeConfig(theta=500000.0, rotary_dim=16))
    sizes = {"hidden_size": 64, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "intermediate_size": 96}
    return tiny_config(num_layers=3, vocab_size=320, attention_types=(kind,), tie_embeddings=False, **sizes)


class Steered(NamedTuple):
    """A model with routers that read a token's depth from its state.

    Attributes:
      model: random weights, in bfloat16 or the requested dtype.
      exits: routers and dials, also for prompts.
    """

    model: Decoder
    exits: Exits

    @property
    def layers(self) -> int:
        """Number of layers."""
        return self.model.config.num_layers

    @property
    def depths(self) -> tuple[int, ...]:
        """Layers that a token of each kind runs; the last kind never exits."""
        return (*(c + 1 for c in self.exits.routers.exit_points), self.layers)

    def ids(self, depths: Sequence[int] | np.ndarray, seed: int = 0) -> np.ndarray:
        """Different token ids, int32, that run as many layers as `depths` says."""
        kinds, wanted = len(self.depths), np.asarray(depths)
        numbers = np.random.default_rng(seed).integers(0, self.model.config.vocab_size // kinds, wanted.shape)
        return (numbers * kinds + np.searchsorted(self.depths, wanted)).astype(np.int32)

    def nearest(self, share: float) -> int:
        """The exit point's depth that is closest to a share of the layers."""
        return min(self.depths[:-1], key=lambda depth: abs(depth - share * self.layers))

    def bytes_read(self) -> int:
        """Bytes of weights that one token reads at full depth: all but the embedding table."""
        return sum(p.value.nbytes for p in stored_parameters(self.model) if not p.path.startswith("embed."))

    def bytes_cached(self, tokens: int) -> int:
        """Bytes of keys and values of `tokens` tokens in one row."""
        heads, keys, values = self.model.config.cache_shape
        return tokens * self.layers * heads * (keys + values) * self.model.dtype.itemsize


def steered(config: DecoderConfig, *, interval: int, bottleneck: int, dtype: jnp.dtype) -> Steered:
    """Makes random weights, one at a time and in place, and routers after every `interval`-th layer."""
    exit_points = exit_point_layers(config.num_layers, interval)
    model = Decoder(config, dtype=dtype, rngs=nnx.Rngs(0))
    directions = _directions(len(exit_points) + 1, config.hidden_size)
    model.embed.kernel[...] = _steer(model.embed.kernel[...], directions)
    routers = tuple(_router(i, directions[i], bottleneck) for i in range(len(exit_points)))
    return Steered(model, Exits.uniform(Routers(routers, None, exit_points), 0.5))


def _directions(count: int, size: int) -> Float[Array, "kinds D"]:
    """Orthogonal unit vectors."""
    columns = np.random.default_rng(1).standard_normal((size, count))
    return jnp.asarray(np.linalg.qr(columns)[0].T, jnp.float32)


@jax.jit
def _steer(table: Float[Array, "V D"], directions: Float[Array, "kinds D"]) -> Float[Array, "V D"]:
    size = table.shape[1] ** 0.5
    kinds = jnp.arange(table.shape[0]) % directions.shape[0]
    return table + (_LENGTH * size * jnp.take(directions, kinds, axis=0)).astype(table.dtype)


def _router(number: int, direction: Float[Array, " D"], bottleneck: int) -> Router:
    """A router whose first hidden unit sees the direction; the others only add their cost."""
    size = direction.shape[0]
    keys = jax.random.split(jax.random.key(number), 3)
    down = jax.random.normal(keys[0], (size, bottleneck)) * size**-0.5
    down = down.at[:, 0].set(direction * (_SHARPNESS / (_SEEN * size**0.5)))
    bias = (0.1 * jax.random.normal(keys[1], (bottleneck,))).at[0].set(-_SHARPNESS)
    up = (0.01 * jax.random.normal(keys[2], (bottleneck,))).at[0].set(1.0)
    return Router(down, bias, up, jnp.float32(-5.0))
