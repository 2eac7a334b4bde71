"""Gemma's lineage. Up to Gemma 3, norms multiply by one plus a weight, and files store that sum."""

from __future__ import annotations

from typing import Any

from convert.sources.gguf.architectures.base import (
    LLAMA,
    TOP,
    Architecture,
    Names,
    bias_settings,
    decoder,
    local_rotary_settings,
    rms_norm_eps,
    shift_norms,
    window_settings,
)
from convert.sources.gguf.hyperparameters import Hyperparameters

_GELU: dict[str, Any] = {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh"}
_SANDWICH: Names = {
    **LLAMA,
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_SANDWICH_NORMS = ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm")
_SHIFTED_TOP = shift_norms(TOP, "output_norm")
_CAPS = ("attn_logit_softcapping", "final_logit_softcapping")


def _gemma(hp: Hyperparameters) -> dict[str, Any]:
    return decoder(hp, "gemma", **rms_norm_eps(hp), **bias_settings(hp), **_GELU)


def _softcaps(hp: Hyperparameters, *names: str) -> dict[str, Any]:
    """Softcaps, which have the same names in a file and in config.json; 0 in a file means none."""
    return {name: hp.take(name) or None for name in names}


def _query_scale(values: dict[str, Any], *largest: int) -> dict[str, Any]:
    """Scores are divided by this number's root: the head width, but in 27B models (told by their layers) the mean."""
    mean = values["hidden_size"] // values["num_attention_heads"]
    return {"query_pre_attn_scalar": mean if values["num_hidden_layers"] in largest else values["head_dim"]}


def _gemma2(hp: Hyperparameters) -> dict[str, Any]:
    window, caps = window_settings(hp), _softcaps(hp, *_CAPS)
    values = decoder(hp, "gemma2", **rms_norm_eps(hp), **bias_settings(hp), **_GELU, **window)
    return values | caps | _query_scale(values, 46)


def _gemma3(hp: Hyperparameters) -> dict[str, Any]:
    window, caps, local = window_settings(hp), _softcaps(hp, *_CAPS), local_rotary_settings(hp)
    values = decoder(hp, "gemma3_text", **rms_norm_eps(hp), **bias_settings(hp), **_GELU, **window)
    rope = {"full_attention": values["rope_parameters"], "sliding_attention": local}
    return values | caps | _query_scale(values, 62) | {"rope_parameters": rope}


def _gemma4(hp: Hyperparameters) -> dict[str, Any]:
    """In Gemma 4, layers with full attention have their own head width and count, and rotate only some channels."""
    hp.expect("attention.shared_kv_layers", 0)
    hp.expect("embedding_length_per_layer_input", 0)
    window, caps = window_settings(hp), _softcaps(hp, "final_logit_softcapping")
    kinds = window["layer_types"]
    whole = kinds.index("full_attention") if "full_attention" in kinds else 0
    heads = hp.take_list("attention.head_count_kv")
    heads = heads if isinstance(heads, list) else [heads] * hp.layers
    if len(heads) < hp.layers:
        raise hp.unsupported_error(f"attention.head_count_kv lists {len(heads)} layers, expected {hp.layers}")
    width, local_width = hp.take("attention.key_length"), hp.take("attention.key_length_swa")
    for name, expected in (("value_length", width), ("value_length_swa", local_width)):
        hp.expect(f"attention.{name}", expected)
    rope = {
        "full_attention": _proportional_rope(hp, width, needed="full_attention" in kinds),
        "sliding_attention": local_rotary_settings(hp),
    }
    hp.expect("rope.dimension_count_swa", local_width)
    values = decoder(
        hp, "gemma4_text", **rms_norm_eps(hp), **bias_settings(hp), **_GELU, **window, head_dim=local_width, rope=rope
    )
    return (
        values
        | caps
        | {
            "num_key_value_heads": heads[kinds.index("sliding_attention") if "sliding_attention" in kinds else 0],
            "num_global_key_value_heads": heads[whole],
            "global_head_dim": width,
            "attention_k_eq_v": f"blk.{whole}.attn_v.weight" not in hp.tensors,
            "hidden_size_per_layer_input": 0,
            "num_kv_shared_layers": 0,
        }
    )


def _proportional_rope(hp: Hyperparameters, width: int, *, needed: bool) -> dict[str, Any]:
    """Counts the rotated channels; the others have nearly infinite divisors."""
    hp.expect("rope.dimension_count", width)
    factors = hp.vector("rope_freqs.weight")
    if factors is None and needed:
        raise hp.unsupported_error("rope_freqs.weight is missing, expected in every such file")
    if factors is not None and factors.shape != (width // 2,):
        raise hp.unsupported_error(f"rope: rope_freqs.weight has shape {list(factors.shape)}, expected [{width // 2}]")
    rotated = width // 2 if factors is None else int((factors == 1.0).sum())
    if factors is not None and not ((factors == 1.0) | (factors > 1e20)).all():
        raise hp.unsupported_error(
            "rope: rope_freqs.weight is not supported, expected divisors of 1 and next to infinity"
        )
    return {
        "rope_type": "proportional",
        "rope_theta": hp.take("rope.freq_base"),
        "partial_rotary_factor": 2 * rotated / width,
    }


ARCHITECTURES: dict[str, Architecture] = {
    "gemma": Architecture(_gemma, shift_norms(LLAMA, "attn_norm", "ffn_norm"), top=_SHIFTED_TOP),
    "gemma2": Architecture(_gemma2, shift_norms(_SANDWICH, *_SANDWICH_NORMS), top=_SHIFTED_TOP),
    "gemma3": Architecture(
        _gemma3, shift_norms(_SANDWICH, *_SANDWICH_NORMS, "attn_q_norm", "attn_k_norm"), top=_SHIFTED_TOP
    ),
    "gemma4": Architecture(_gemma4, {**_SANDWICH, "layer_output_scale.weight": "layer_scalar"}),
}
