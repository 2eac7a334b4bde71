"""Gemma's lineage, whose norms multiply by one plus a weight that is stored with the one added."""

from __future__ import annotations

from typing import Any

from convert.gguf_architectures.base import (
    LLAMA,
    TOP,
    Architecture,
    Names,
    biases,
    decoder,
    local_rotary,
    rms,
    shifted,
    sliding,
)
from convert.gguf_hyperparameters import Hyperparameters

_GELU: dict[str, Any] = {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh"}
_SANDWICH: Names = {
    **LLAMA,
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_SANDWICH_NORMS = ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm")
_SHIFTED_TOP = shifted(TOP, "output_norm")


def _gemma(hp: Hyperparameters) -> dict[str, Any]:
    return decoder(hp, "gemma", **rms(hp), **biases(hp), **_GELU)


def _softcaps(hp: Hyperparameters) -> dict[str, Any]:
    names = ("attn_logit_softcapping", "final_logit_softcapping")
    return {name: hp.take(name) for name in names}


def _query_scale(values: dict[str, Any], *largest: int) -> dict[str, Any]:
    """What scores are divided by the root of: heads' width, but in the 27B models, told by their layers, the mean."""
    mean = values["hidden_size"] // values["num_attention_heads"]
    return {"query_pre_attn_scalar": mean if values["num_hidden_layers"] in largest else values["head_dim"]}


def _gemma2(hp: Hyperparameters) -> dict[str, Any]:
    window, caps = sliding(hp, period=2), _softcaps(hp)
    values = decoder(hp, "gemma2", **rms(hp), **biases(hp), **_GELU, **window)
    return values | caps | _query_scale(values, 46)


def _gemma3(hp: Hyperparameters) -> dict[str, Any]:
    window, caps = sliding(hp, period=6), _softcaps(hp)
    local = local_rotary(hp, 10000.0)
    values = decoder(hp, "gemma3_text", **rms(hp), **biases(hp), **_GELU, **window)
    rope = {"full_attention": values["rope_parameters"], "sliding_attention": local}
    return values | caps | _query_scale(values, 62) | {"rope_parameters": rope}


ARCHITECTURES: dict[str, Architecture] = {
    "gemma": Architecture(_gemma, shifted(LLAMA, "attn_norm", "ffn_norm"), top=_SHIFTED_TOP),
    "gemma2": Architecture(_gemma2, shifted(_SANDWICH, *_SANDWICH_NORMS), top=_SHIFTED_TOP),
    "gemma3": Architecture(
        _gemma3, shifted(_SANDWICH, *_SANDWICH_NORMS, "attn_q_norm", "attn_k_norm"), top=_SHIFTED_TOP
    ),
}
