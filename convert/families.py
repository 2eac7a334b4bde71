"""The supported model families: for each, a configuration function and a weight map. A family is one table entry."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from convert import weights
from convert.rope import rope_config
from convert.rules import Rule
from tide_jax.activations import ACTIVATIONS
from tide_jax.config import AttentionType, DecoderConfig, MoEConfig
from tide_jax.errors import TideError


def _first(hf: Any, *names: str) -> Any:
    return next((value for name in names if (value := getattr(hf, name, None)) is not None), None)


def _head_dim(hf: Any) -> int:
    return getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads


def _require(hf: Any, **values: Any) -> None:
    """Refuses by name what the model does not implement."""
    for name, value in values.items():
        if (found := getattr(hf, name, value)) != value:
            raise TideError(f"{hf.model_type} with {name}={found!r} is not supported, only {name}={value!r}")


def _rotary(hf: Any, layer_types: Sequence[str] | None = None, scale: float | None = None) -> list[AttentionType]:
    """Each layer's attention; `layer_types` are the configuration's own, all full attention when omitted."""
    kinds = layer_types or ["full_attention"] * hf.num_hidden_layers
    if unknown := set(kinds) - {"full_attention", "sliding_attention"}:
        raise TideError(f"{hf.model_type} with layer type {', '.join(sorted(unknown))} is not supported")
    head_dim = _head_dim(hf)
    return [
        AttentionType(
            scale=head_dim**-0.5 if scale is None else scale,
            window=hf.sliding_window if kind == "sliding_attention" else None,
            rope=rope_config(hf, head_dim, kind),
        )
        for kind in kinds
    ]


def _windowed(hf: Any) -> list[str]:
    """Layer types of families that slide in every layer or in none."""
    return ["full_attention" if hf.sliding_window is None else "sliding_attention"] * hf.num_hidden_layers


def _decoder(hf: Any, layers: Sequence[AttentionType], **flags: Any) -> DecoderConfig:
    """The fields every family names alike, with `flags` on top."""
    types = tuple(dict.fromkeys(layers))
    activation = _first(hf, "hidden_activation", "hidden_act", "activation_function")
    if activation not in ACTIVATIONS:
        raise TideError(f"activation {activation!r} is not implemented, only {', '.join(sorted(ACTIVATIONS))}")
    fields: dict[str, Any] = {
        "model_type": hf.model_type,
        "vocab_size": hf.vocab_size,
        "hidden_size": hf.hidden_size,
        "num_layers": hf.num_hidden_layers,
        "num_heads": hf.num_attention_heads,
        "num_kv_heads": _first(hf, "num_key_value_heads", "num_attention_heads"),
        "head_dim": _head_dim(hf),
        "intermediate_size": _first(hf, "intermediate_size"),
        "max_positions": hf.max_position_embeddings,
        "attention_types": types,
        "attention_pattern": tuple(types.index(layer) for layer in layers),
        "norm_eps": _first(hf, "rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon"),
        "activation": activation,
        "tie_embeddings": bool(hf.tie_word_embeddings),
    }
    return DecoderConfig(**(fields | flags))


def _llama(hf: Any) -> DecoderConfig:
    bias = hf.attention_bias
    return _decoder(hf, _rotary(hf), qkv_bias=bias, attention_out_bias=bias, mlp_bias=hf.mlp_bias)


def _mistral(hf: Any) -> DecoderConfig:
    return _decoder(hf, _rotary(hf, _windowed(hf)))


def _qwen2(hf: Any) -> DecoderConfig:
    return _decoder(hf, _rotary(hf, hf.layer_types), qkv_bias=True)


def _qwen3(hf: Any) -> DecoderConfig:
    bias = hf.attention_bias
    return _decoder(hf, _rotary(hf, hf.layer_types), qkv_bias=bias, attention_out_bias=bias, qk_norm=True)


def _mixtral(hf: Any) -> DecoderConfig:
    moe = MoEConfig(num_experts=hf.num_local_experts, experts_per_token=hf.num_experts_per_tok)
    return _decoder(hf, _rotary(hf, _windowed(hf)), moe=moe)


def _gemma3(hf: Any) -> DecoderConfig:
    _require(hf, use_bidirectional_attention=False, attn_logit_softcapping=None)
    return _decoder(
        hf,
        _rotary(hf, hf.layer_types, hf.query_pre_attn_scalar**-0.5),
        qkv_bias=hf.attention_bias,
        attention_out_bias=hf.attention_bias,
        qk_norm=True,
        norm_unit_offset=True,
        norm_placement="sandwich",
        embedding_scale=hf.hidden_size**0.5,
        logit_softcap=hf.final_logit_softcapping,
    )


def _gpt2(hf: Any) -> DecoderConfig:
    _require(hf, add_cross_attention=False)
    scale = _head_dim(hf) ** -0.5 if hf.scale_attn_weights else 1.0
    by_layer = hf.scale_attn_by_inverse_layer_idx
    return _decoder(
        hf,
        [AttentionType(scale=scale / (i + 1) if by_layer else scale) for i in range(hf.num_hidden_layers)],
        intermediate_size=hf.n_inner or 4 * hf.hidden_size,
        norm="layer",
        norm_bias=True,
        positions="learned",
        learned_positions=hf.max_position_embeddings,
        qkv_bias=True,
        attention_out_bias=True,
        num_kv_heads=hf.num_attention_heads,
        mlp_gated=False,
        mlp_bias=True,
    )


def _gpt_neox(hf: Any) -> DecoderConfig:
    return _decoder(
        hf,
        _rotary(hf),
        norm="layer",
        norm_bias=True,
        parallel_residual=hf.use_parallel_residual,
        qkv_bias=hf.attention_bias,
        attention_out_bias=hf.attention_bias,
        num_kv_heads=hf.num_attention_heads,
        mlp_gated=False,
        mlp_bias=True,
    )


@dataclasses.dataclass(frozen=True)
class Family:
    """How checkpoints of one model type convert.

    Attributes:
      config: the decoder configuration of a transformers configuration object.
      rules: the weight map.
    """

    config: Callable[[Any], DecoderConfig]
    rules: tuple[Rule, ...]


FAMILIES: dict[str, Family] = {
    "gemma3_text": Family(_gemma3, weights.GEMMA3),
    "gpt2": Family(_gpt2, weights.GPT2),
    "gpt_neox": Family(_gpt_neox, weights.GPT_NEOX),
    "llama": Family(_llama, weights.LLAMA),
    "mistral": Family(_mistral, weights.LLAMA),
    "mixtral": Family(_mixtral, weights.MIXTRAL),
    "qwen2": Family(_qwen2, weights.LLAMA),
    "qwen3": Family(_qwen3, weights.LLAMA),
}
