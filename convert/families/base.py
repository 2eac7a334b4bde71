"""Helpers for the configuration functions of all families."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from convert.configuration.rope import rope_config
from convert.weights.parts import LLAMA
from convert.weights.rules import Rule
from tide_jax.errors import TideError, shorten
from tide_jax.model.activations import KNOWN_ACTIVATIONS
from tide_jax.model.architecture import AttentionType, DecoderConfig, QKNorm
from tide_jax.model.recurrent.types import RecurrentType


@dataclasses.dataclass(frozen=True)
class BlockAdapters:
    """A list of low-rank adapters.

    Attributes:
      module: the module inside the block whose output they add to.
      names: name of the list inside the block.
      flag: the field of config.json that says whether a checkpoint has them; None if all do.
    """

    module: str
    names: str
    flag: str | None = None


@dataclasses.dataclass(frozen=True)
class SharedBlocks:
    """Blocks of weights that layers share in a checkpoint; see `convert.sources.shared_blocks`.

    Attributes:
      module: name of the block's module inside a layer.
      beside: name of a tensor that each layer with a block has.
      count: the field of config.json with the number of blocks, which layers use in turn; None for one block.
      adapters: lists of low-rank adapters inside the block, with one entry for each layer that uses a block.
    """

    module: str
    beside: str
    count: str | None = None
    adapters: tuple[BlockAdapters, ...] = ()


@dataclasses.dataclass(frozen=True)
class Family:
    """Entry in the table of families: how checkpoints of one model type convert.

    Attributes:
      config: maps a transformers configuration object to the decoder configuration.
      rules: the weight map.
      overflows_float16: activations of published models exceed float16's range (65,504).
      shared_blocks: the blocks that layers share; each layer gets its own copy.
    """

    config: Callable[[Any], DecoderConfig]
    rules: tuple[Rule, ...] = LLAMA
    overflows_float16: bool = False
    shared_blocks: SharedBlocks | None = None


def first_set(hf: Any, *names: str) -> Any:
    """Returns the first of several fields that exists and is set, else None."""
    return next((value for name in names if (value := getattr(hf, name, None)) is not None), None)


def head_dim(hf: Any) -> int:
    """Channels of a head."""
    return getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads


def norm_eps(hf: Any) -> float:
    """The eps that norms add to the mean square."""
    names = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps", "norm_epsilon", "layernorm_epsilon")
    return first_set(hf, *names)


def require(hf: Any, **values: Any) -> None:
    """Raises TideError, naming the field, if a field differs from the only implemented value.

    None and False count as equal.
    """
    for name, value in values.items():
        found = getattr(hf, name, value)
        if found != value and (found or value):
            raise TideError(f"{hf.model_type} with {name}={found!r} is not supported, only {name}={value!r}")


def rotary_layers(
    hf: Any,
    layer_types: Sequence[str] | None = None,
    scale: float | None = None,
    *,
    interleaved: bool = False,
    no_rope: Sequence[bool] | None = None,
    **flags: Any,
) -> list[AttentionType]:
    """Returns each layer's attention, with rotary embedding.

    Args:
      layer_types: "full_attention" or "sliding_attention" for each layer; all full when omitted.
      scale: factor of query-key products; ``head_dim ** -0.5`` when omitted.
      interleaved: see `RopeConfig`.
      no_rope: for each layer, whether to omit rotary embedding.
      flags: further fields of `AttentionType`.
    """
    kinds = layer_types or ["full_attention"] * hf.num_hidden_layers
    if unknown := set(kinds) - {"full_attention", "sliding_attention"}:
        raise TideError(
            f"{hf.model_type} with layer type {', '.join(sorted(unknown))} is not supported, only full_attention and "
            "sliding_attention"
        )
    width = head_dim(hf)

    def attention(layer: int, kind: str) -> AttentionType:
        rotated = no_rope is None or not no_rope[layer]
        return AttentionType(
            scale=width**-0.5 if scale is None else scale,
            window=hf.sliding_window if kind == "sliding_attention" else None,
            rope=rope_config(hf, width, kind, interleaved=interleaved) if rotated else None,
            **flags,
        )

    return [attention(layer, kind) for layer, kind in enumerate(kinds)]


def with_rope(layer: AttentionType, **changes: Any) -> AttentionType:
    """Changes fields of a layer's rotary embedding."""
    assert layer.rope is not None
    return dataclasses.replace(layer, rope=dataclasses.replace(layer.rope, **changes))


def layers_without_rope(hf: Any, scale: float | None = None, **flags: Any) -> list[AttentionType]:
    """Returns each layer's attention, without rotary embedding; see `rotary_layers` for the arguments."""
    return [AttentionType(scale=head_dim(hf) ** -0.5 if scale is None else scale, **flags)] * hf.num_hidden_layers


def learned_positions(rows: int, offset: int = 0) -> dict[str, Any]:
    """Flags for a learned position table with `rows` positions after `offset` unused rows."""
    return {"positions": "learned", "learned_positions": rows + offset, "position_offset": offset}


def static_ntk(hf: Any, layers: Sequence[AttentionType]) -> list[AttentionType]:
    """Replaces "dynamic" scaling with an `alpha` by a larger rotary base, which does not depend on the length."""
    alpha, dim = hf.rope_parameters.get("alpha"), head_dim(hf)
    if hf.rope_parameters.get("rope_type") != "dynamic" or not alpha:
        return list(layers)
    theta = float(hf.rope_parameters["rope_theta"] * alpha ** (dim / (dim - 2)))
    return [with_rope(layer, kind="default", theta=theta, factor=1.0, max_positions=0) for layer in layers]


def uniform_layer_types(hf: Any) -> list[str]:
    """Layer types of families that use a sliding window in every layer or in none."""
    kind = "full_attention" if getattr(hf, "sliding_window", None) is None else "sliding_attention"
    return [kind] * hf.num_hidden_layers


def biases(value: bool, *, out: bool | None = None) -> dict[str, bool]:
    """Flags for attention biases: `value` for queries, keys and values; `out` (default `value`) for the output."""
    return {"qkv_bias": bool(value), "attention_out_bias": bool(value if out is None else out)}


def rms_qk_norm(hf: Any, **flags: Any) -> QKNorm:
    """RMS norm of each head's queries and keys, with the configuration's eps."""
    return QKNorm(eps=norm_eps(hf), **flags)


def decoder(hf: Any, layers: Sequence[AttentionType | RecurrentType], **flags: Any) -> DecoderConfig:
    """Builds a configuration from the usual field names and `flags`. Raises TideError for an unknown activation."""
    kinds = dict.fromkeys(layers)
    attention = tuple(kind for kind in kinds if isinstance(kind, AttentionType))
    recurrent = tuple(kind for kind in kinds if not isinstance(kind, AttentionType))
    types = (*attention, *recurrent)
    fields: dict[str, Any] = {
        "model_type": hf.model_type,
        "vocab_size": hf.vocab_size,
        "hidden_size": hf.hidden_size,
        "num_layers": hf.num_hidden_layers,
        "num_heads": hf.num_attention_heads,
        "num_kv_heads": first_set(hf, "num_key_value_heads", "num_attention_heads"),
        "head_dim": head_dim(hf),
        "intermediate_size": first_set(hf, "intermediate_size"),
        "max_positions": first_set(hf, "max_position_embeddings"),
        "attention_types": attention,
        "recurrent_types": recurrent,
        "layer_pattern": tuple(types.index(layer) for layer in layers),
        "norm_eps": norm_eps(hf),
        "activation": first_set(hf, "hidden_activation", "hidden_act", "activation_function"),
        "tie_embeddings": bool(hf.tie_word_embeddings),
    }
    fields |= flags
    if fields["activation"] not in KNOWN_ACTIVATIONS:
        found = shorten(repr(fields["activation"]))
        raise TideError(f"activation {found} is not supported, expected one of {', '.join(sorted(KNOWN_ACTIVATIONS))}")
    return DecoderConfig(**fields)


def plain_layer_norm(**flags: Any) -> dict[str, Any]:
    """Flags of the GPT lineage: LayerNorm with a bias, an MLP without a gate, biases everywhere."""
    return {"norm": "layer", "norm_bias": True, "mlp_gated": False, "mlp_bias": True} | biases(True) | flags
