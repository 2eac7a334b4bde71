"""Tiny models, routers and a tokenizer, for tests of tide_jax and of projects built on it."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from tide_jax.config import exit_point_layers
from tide_jax.exits.router import SCREEN_LEVELS, Candidates, Confidence, ExitHead, Router, Routers
from tide_jax.exits.translators import LayerTranslators, Translators
from tide_jax.model.architecture import AttentionType, DecoderConfig, RopeConfig
from tide_jax.model.decoder import Decoder
from tide_jax.model.recurrent.types import GatedDeltaType, NothingType, SelectiveType, ShortConvType, StateSpaceType


def tiny_config(**changes: Any) -> DecoderConfig:
    """A Llama-like configuration of 6 layers with 6 query heads, 2 key-value heads and an odd vocabulary size.

    `changes` replace fields.
    """
    num_layers = changes.get("num_layers", 6)
    fields: dict[str, Any] = {
        "model_type": "tiny",
        "vocab_size": 259,
        "hidden_size": 48,
        "num_layers": num_layers,
        "num_heads": 6,
        "num_kv_heads": 2,
        "head_dim": 8,
        "intermediate_size": 80,
        "max_positions": 512,
        "attention_types": (AttentionType(scale=8**-0.5, rope=RopeConfig(theta=10000.0, rotary_dim=8)),),
        "layer_pattern": (0,) * num_layers,
    }
    return DecoderConfig(**(fields | changes))


def tiny_hybrid_config(**changes: Any) -> DecoderConfig:
    """`tiny_config` with layers of many kinds.

    In order: Mamba-2, a delta net without feed-forward block, attention, a short convolution, a feed-forward block
    alone, and Mamba. `changes` replace fields.
    """
    kinds = (
        ShortConvType(width=3),
        StateSpaceType(heads=6, head_dim=8, groups=2, state_size=10, width=4),
        GatedDeltaType(key_heads=2, value_heads=4, key_dim=8, value_dim=6, width=4),
        SelectiveType(inner=40, state_size=5, step_rank=3, width=4),
        NothingType(),
    )
    fields: dict[str, Any] = {
        "recurrent_types": kinds,
        "layer_pattern": (2, 3, 0, 1, 5, 4),
        "mlp_layers": (0, 2, 3, 4, 5),
    }
    return tiny_config(**(fields | changes))


def tiny_decoder(config: DecoderConfig | None = None, *, seed: int = 0, dtype: Any = jnp.float32) -> Decoder:
    """A randomly initialised decoder."""
    return Decoder(config or tiny_config(), dtype=dtype, rngs=nnx.Rngs(seed))


def random_routers(
    config: DecoderConfig,
    *,
    interval: int = 2,
    bottleneck: int = 16,
    affine: bool = False,
    translator_rank: int | None = None,
    model: Decoder | None = None,
    seed: int = 0,
) -> Routers:
    """Untrained routers with scores spread over (0, 1), so that rows exit at different exit points.

    With `model`, they also have candidates and confidence for a second look at exiting tokens.
    """
    d, exit_points = config.hidden_size, exit_point_layers(config.num_layers, interval)

    def normal(*path: int, shape: tuple[int, ...], scale: float) -> jax.Array:
        key = jax.random.key(seed)
        for part in path:
            key = jax.random.fold_in(key, part)
        return scale * jax.random.normal(key, shape, jnp.float32)

    def router(c: int) -> Router:
        return Router(
            down=normal(c, 0, shape=(d, bottleneck), scale=2 * d**-0.5),
            down_bias=normal(c, 1, shape=(bottleneck,), scale=0.1),
            up=normal(c, 2, shape=(bottleneck,), scale=2 * bottleneck**-0.5),
            up_bias=jnp.float32(0.0),
        )

    def head(c: int) -> ExitHead:
        return ExitHead((normal(c, 3, shape=(d, d), scale=d**-0.5),), normal(c, 4, shape=(d,), scale=0.1))

    def confidence(c: int) -> Confidence:
        down = normal(c, 8, shape=(4, 3), scale=0.3).at[0].add(1.0)  # mostly the router's score
        undecided = jnp.asarray([0.0, -4.0, 0.4, 4.5], jnp.float32)  # the features of an undecided answer
        bias = -jnp.dot(undecided, down, precision="highest")
        screens = jnp.linspace(0.3, 0.44, len(SCREEN_LEVELS), dtype=jnp.float32)
        return Confidence(screens, down, bias, jnp.ones((3,), jnp.float32), jnp.float32(-0.3))

    def translators(rank: int) -> Translators:
        down = tuple(normal(c, 5, shape=(d, rank), scale=d**-0.5) for c in count)
        return Translators(down, tuple(layer_translators(i, rank) for i in range(config.num_layers)))

    def layer_translators(layer: int, rank: int) -> LayerTranslators | None:
        number = sum(c + 1 < layer for c in exit_points)
        if number == 0:
            return None
        shift = normal(layer, 6, shape=(number, d), scale=0.5)
        return LayerTranslators(shift, normal(layer, 7, shape=(number, rank, d), scale=max(rank, 1) ** -0.5))

    count = range(len(exit_points))
    heads = tuple(head(c) for c in count) if affine else None
    translator_maps = None if translator_rank is None else translators(translator_rank)
    routers = Routers(tuple(router(c) for c in count), heads, exit_points, translator_maps)
    if model is None:
        return routers
    ids = jnp.arange(1, config.vocab_size, 3, dtype=jnp.int32)
    confidences = tuple(confidence(c) for c in count)
    return dataclasses.replace(routers, candidates=Candidates(ids, model.head_rows(ids)), confidence=confidences)


def constant_routers(config: DecoderConfig, *, interval: int, exits: bool = True, bottleneck: int = 1) -> Routers:
    """Routers that score every token 1.0 (or 0.0); with `min_layers` they force a depth.

    With a realistic `bottleneck`, they cost as much as real routers.
    """
    d, bias = config.hidden_size, jnp.float32(200.0 if exits else -200.0)
    zeros = jnp.zeros((bottleneck,), jnp.float32)
    router = Router(jnp.zeros((d, bottleneck), jnp.float32), zeros, zeros, bias)
    exit_points = exit_point_layers(config.num_layers, interval)
    return Routers((router,) * len(exit_points), None, exit_points)


class ByteTokenizer:
    """A tokenizer of bytes after three special tokens, with enough of the interface for calibration and tests."""

    bos_token_id, eos_token_id, pad_token_id = 0, 1, 2
    chat_template = None
    vocab_size = 259

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text, starting with the beginning-of-text token."""
        return [self.bos_token_id] * add_special_tokens + [b + 3 for b in text.encode()]

    def decode(self, ids: Any, skip_special_tokens: bool = True) -> str:
        """The text of token ids; invalid UTF-8 becomes replacement characters."""
        return bytes(int(i) - 3 for i in ids if int(i) >= 3).decode(errors="replace")

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        """``{"input_ids": [...]}``."""
        return {"input_ids": self.encode(text)}
