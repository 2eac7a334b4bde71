"""Tiny decoders of every kind that the configuration's flags can describe."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tide_jax import TIDE, ExitConfig
from tide_jax.model.architecture import (
    AddScales,
    AttentionType,
    DecoderConfig,
    LatentConfig,
    MoEConfig,
    QKNorm,
    QueryScaling,
    RopeConfig,
)
from tide_jax.model.decoder import Decoder, abstract_parameters, from_parameters, parameters
from tide_jax.model.layers import DecoderLayer
from tide_jax.model.recurrent.types import (
    KimiDeltaType,
    LightningType,
    MatrixLSTMType,
    RgLruType,
    SelectiveType,
    StateSpaceType,
    TimeMixType,
)
from tide_jax.testing import random_routers, tiny_config, tiny_hybrid_config

_GLOBAL = AttentionType(scale=0.3, rope=RopeConfig(theta=10000.0, rotary_dim=8))
_NORMED = dataclasses.replace(_GLOBAL, qk_norm=QKNorm())
_CHUNKED = AttentionType(
    scale=0.4,
    chunk=6,
    rope=RopeConfig(theta=100.0, rotary_dim=6, interleaved=True, reverse=True),
    qk_norm=QKNorm(kind="layer", all_heads=True, bias=True, after_rope=True),
)
_SLIDING = AttentionType(scale=0.4, window=5, rope=RopeConfig(theta=100.0, rotary_dim=4))

CONFIGS: dict[str, DecoderConfig] = {
    "pre norm": tiny_config(num_layers=5),
    "sandwich norms": tiny_config(
        num_layers=2,
        norm_placement="sandwich",
        norm_unit_offset=True,
        embedding_scale=4.0,
        attention_softcap=4.0,
        logit_softcap=9.0,
        activation="gelu_pytorch_tanh",
    ),
    "post norm": tiny_config(num_layers=2, norm_placement="post", attention_types=(_NORMED,), tie_embeddings=False),
    "parallel": tiny_config(
        num_layers=2,
        norm="layer",
        norm_bias=True,
        parallel_residual=True,
        positions="learned",
        learned_positions=64,
        max_positions=64,
        attention_types=(AttentionType(scale=0.35),),
        num_kv_heads=6,
        qkv_bias=True,
        attention_out_bias=True,
        mlp_gated=False,
        mlp_bias=True,
        activation="gelu",
        tie_embeddings=False,
        head_bias=True,
    ),
    "experts": tiny_config(
        num_layers=2,
        moe=MoEConfig(num_experts=5, experts_per_token=2, intermediate_size=40),
        normed_residual=True,
        stream_scale=1.7,
    ),
    "alibi and sinks": tiny_config(
        num_layers=2,
        attention_types=(AttentionType(scale=0.3, alibi=(0.5, 0.3, 0.2, 0.1, 0.05, 0.0), sinks=True),),
        positions="none",
        norm="layer",
        norm_bias=True,
        parallel_residual=True,
        shared_norm=True,
        embedding_norm=True,
        clip_qkv=0.8,
    ),
    "norms after the residual add": tiny_config(
        num_layers=4,
        attention_types=(AttentionType(scale=0.35),),
        norm_placement="residual",
        norm="layer",
        norm_bias=True,
        final_norm=False,
        positions="sinusoidal",
        position_offset=2,
        sinusoid_endpoint=True,
        embedding_size=40,
        mlp_gated=False,
        activation="relu2",
        tie_embeddings=False,
    ),
    "gated output": tiny_config(
        num_layers=3,
        attention_types=(_CHUNKED, dataclasses.replace(_GLOBAL, query_scaling=QueryScaling(0.7, 3.0, 1))),
        layer_pattern=(0, 1, 0),
        attention_gate="channel",
        sub_norm=True,
        residual_scale=0.6,
        logit_scale=1.7,
    ),
    "latent attention": tiny_config(
        num_layers=3,
        attention_types=(AttentionType(scale=0.3, rope=RopeConfig(theta=1000.0, rotary_dim=6, interleaved=True)),),
        latent=LatentConfig(kv_rank=20, q_rank=18, nope_dim=8, rope_dim=6, value_dim=10, q_scale=1.2, kv_scale=0.8),
        attention_gate="head",
        head_dim=14,
        num_kv_heads=6,
        moe=MoEConfig(5, 2, 40, layers=(1, 2), scale=1.3, shared_size=24),
    ),
    "sliding windows": tiny_config(num_layers=4, attention_types=(_GLOBAL, _SLIDING), layer_pattern=(1, 0, 1, 1)),
    "hybrid": tiny_hybrid_config(),
    "side by side": tiny_config(
        recurrent_types=(
            StateSpaceType(6, 8, 2, 10, 4, norm="before_gate", scales=(0.7, 1.3, 0.6, 1.2, 0.9), output_scale=0.8),
        ),
        beside_attention=0,
        value_scale=1.4,
        mlp_gate_scale=0.8,
        mlp_scales=AddScales(stream=0.9, update=0.6),
    ),
    "guided": tiny_config(
        num_layers=6,
        attention_types=(_GLOBAL,),
        recurrent_types=(SelectiveType(inner=40, state_size=6, step_rank=3, width=4, heads=2),),
        layer_pattern=(1, 0, 1, 0, 0, 1),
        beside_attention=0,
        mlp_layers=(),
        carried="embedding",
    ),
    "shortcut": tiny_config(
        num_layers=6,
        attention_types=(_GLOBAL,),
        layer_pattern=(0,) * 6,
        moe=MoEConfig(5, 3, 40, zero_experts=3, layers=(0, 2, 4), scale=1.3),
        carried="shortcut",
    ),
    "other recurrences": tiny_config(
        num_layers=7,
        recurrent_types=(
            LightningType(heads=4, head_dim=6, fade=0.7),
            KimiDeltaType(heads=4, head_dim=5, width=4, gate_rank=7),
            RgLruType(blocks=4, block_dim=10, width=4),
            MatrixLSTMType(heads=4, key_dim=5, value_dim=6),
            TimeMixType(inner=40, mixes_mlp=True),
        ),
        layer_pattern=(5, 0, 1, 2, 3, 4, 5),  # behind the first exit point: one of each
    ),
}


def tiny_model(config: DecoderConfig, *, seed: int = 0, dtype: Any = jnp.float32) -> Decoder:
    """A decoder with random norms and biases, too: default ones hide mistakes."""
    rng = np.random.default_rng(seed)

    def random(path: str, shape: tuple[int, ...]) -> np.ndarray:
        if path.endswith("scale"):
            return (0.0 if config.norm_unit_offset else 1.0) + 0.2 * rng.normal(size=shape)
        return rng.normal(size=shape) * (0.2 if path.endswith("bias") else config.hidden_size**-0.5)

    tensors = {path: random(path, shape).astype(np.float32) for path, shape in abstract_parameters(config).items()}
    return from_parameters(config, tensors.items(), dtype=dtype)


def with_parameters(model: Decoder, changes: dict[str, Any]) -> Decoder:
    """The model with some parameters replaced; a number fills the whole tensor."""
    tensors = parameters(model)
    unknown = set(changes) - set(tensors)
    assert not unknown, unknown
    filled = {path: np.broadcast_to(np.float32(value), tensors[path].shape) for path, value in changes.items()}
    return from_parameters(model.config, (tensors | filled).items(), dtype=model.dtype)


def random_prompts(lengths: tuple[int, ...], *, seed: int = 0, vocab: int = 259) -> list[list[int]]:
    """Rows of random token ids."""
    rng = np.random.default_rng(seed)
    return [rng.integers(3, vocab, n).tolist() for n in lengths]


def routed_engine(name: str, **settings: Any) -> TIDE:
    """An engine over one of `CONFIGS`, with every part that routers can have; `settings` are its `ExitConfig`'s."""
    return engine_over(CONFIGS[name], **settings)


def engine_over(config: DecoderConfig, **settings: Any) -> TIDE:
    """`routed_engine` for any configuration."""
    model = tiny_model(config)
    interval = 2 if model.config.num_layers > 4 else 1
    routers = random_routers(model.config, interval=interval, affine=True, translator_rank=3, model=model)
    return TIDE(model, routers, ExitConfig(min_layers=0, **settings))


def record_layers(model: Decoder, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list to which each layer adds its number when it runs, on the device's side."""
    ran: list[int] = []
    for number, layer in enumerate(model.layers):
        layer.number = number

    run = DecoderLayer.__call__

    def recorded(layer: Any, *arguments: Any) -> Any:
        jax.debug.callback(lambda: ran.append(layer.number))
        return run(layer, *arguments)

    monkeypatch.setattr(DecoderLayer, "__call__", recorded)
    return ran
