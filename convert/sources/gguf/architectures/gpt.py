"""The GPT lineage: fused projections whose queries, keys and values llama.cpp separates."""

from __future__ import annotations

from typing import Any

import numpy as np

from convert.sources.gguf.architectures.base import (
    Architecture,
    Names,
    decoder,
    group_by_head,
    inner_size,
    layer_norm_eps,
    qkv_clamp,
    transpose,
)
from convert.sources.gguf.hyperparameters import Hyperparameters
from convert.sources.gguf.tensors import Config, To

_ABSENT_FIELDS = ("hidden_act", "head_dim")
_GROUPED_BY_HEAD = To("self_attention.query_key_value", group_by_head)
_GPT2_TOP: Names = {
    "token_embd": "transformer.wte",
    "position_embd": "transformer.wpe",
    "output_norm": "transformer.ln_f",
    "output": "lm_head",
}
_GPT2: Names = {
    "attn_norm": "ln_1",
    "attn_qkv": "attn.c_attn",
    "attn_output": "attn.c_proj",
    "ffn_norm": "ln_2",
    "ffn_up": "mlp.c_fc",
    "ffn_down": "mlp.c_proj",
}
_CONV1D = ("attn_qkv", "attn_output", "ffn_up", "ffn_down")
_BLOOM: Names = {
    "attn_norm": "input_layernorm",
    "attn_qkv": _GROUPED_BY_HEAD,
    "attn_output": "self_attention.dense",
    "ffn_norm": "post_attention_layernorm",
    "ffn_up": "mlp.dense_h_to_4h",
    "ffn_down": "mlp.dense_4h_to_h",
}


def _gpt2(hp: Hyperparameters) -> dict[str, Any]:
    return decoder(
        hp,
        "gpt2",
        **layer_norm_eps(hp, "layer_norm_epsilon"),
        n_inner=inner_size(hp),
        activation_function="gelu_new",
        without=_ABSENT_FIELDS,
    )


def _gpt_neox(hp: Hyperparameters) -> dict[str, Any]:
    return decoder(
        hp,
        "gpt_neox",
        **layer_norm_eps(hp),
        hidden_act="gelu",
        use_parallel_residual=hp.take("use_parallel_residual"),
        attention_bias=hp.has("attn_qkv.bias"),
        partial=True,
    )


def _starcoder(hp: Hyperparameters) -> dict[str, Any]:
    return decoder(
        hp,
        "gpt_bigcode",
        **layer_norm_eps(hp, "layer_norm_epsilon"),
        n_inner=inner_size(hp),
        activation_function="gelu_pytorch_tanh",
        multi_query=hp.peek("attention.head_count_kv") == 1,
        without=_ABSENT_FIELDS,
    )


def _bloom(hp: Hyperparameters) -> dict[str, Any]:
    values = decoder(hp, "bloom", **layer_norm_eps(hp, "layer_norm_epsilon"), without=_ABSENT_FIELDS)
    return values | {"seq_length": values["max_position_embeddings"]}


def _falcon(hp: Hyperparameters) -> dict[str, Any]:
    """The first Falcons share one key-value head, newer ones have groups; one norm or two for the two sublayers."""
    hp.expect("tensor_data_layout", "jploski")
    heads = hp.take("attention.head_count_kv")
    return decoder(
        hp,
        "falcon",
        **layer_norm_eps(hp, "layer_norm_epsilon"),
        num_key_value_heads=heads,
        num_kv_heads=heads,
        multi_query=heads == 1,
        new_decoder_architecture=heads > 1 or _has_two_norms(hp),
        num_ln_in_parallel_attn=2 if _has_two_norms(hp) else 1,
        parallel_attn=True,
        alibi=False,
        bias=hp.has("attn_qkv.bias"),
        activation="gelu",
        ffn_hidden_size=inner_size(hp),
        without=_ABSENT_FIELDS,
    )


def _has_two_norms(hp: Hyperparameters) -> bool:
    return hp.has("attn_norm_2.weight")


def _falcon_block(hp: Hyperparameters) -> Names:
    norms = {"attn_norm": "ln_mlp", "attn_norm_2": "ln_attn"} if _has_two_norms(hp) else {}
    return {**_BLOOM, "attn_qkv": To("self_attention.query_key_value", _interleave_groups), **norms}


def _interleave_groups(a: np.ndarray, c: Config) -> np.ndarray:
    """Reorders rows from all queries, keys, values to groups of queries, each with its shared key and value."""
    heads, groups = c["num_attention_heads"], c["num_kv_heads"]
    split = a.reshape(heads + 2 * groups, -1, *a.shape[1:])
    shape = (groups, -1, *split.shape[1:])
    parts = (split[:heads], split[heads : heads + groups], split[heads + groups :])
    return np.concatenate([part.reshape(shape) for part in parts], axis=1).reshape(a.shape)


def _mpt(hp: Hyperparameters) -> dict[str, Any]:
    attention = {
        "alibi": True,
        "alibi_bias_max": int(hp.take("attention.max_alibi_bias")),
        "clip_qkv": qkv_clamp(hp),
        "qk_ln": False,
    }
    if not attention["alibi_bias_max"]:
        raise hp.unsupported_error("attention.max_alibi_bias=0.0: not supported, expected linear biases")
    values = decoder(
        hp,
        "mpt",
        **layer_norm_eps(hp, "layer_norm_epsilon"),
        attn_config=attention,
        no_bias=True,
        expansion_ratio=inner_size(hp) // hp.peek("embedding_length"),
        without=_ABSENT_FIELDS,
    )
    return values | {"max_seq_len": values["max_position_embeddings"]}


ARCHITECTURES: dict[str, Architecture] = {
    "gpt2": Architecture(
        _gpt2,
        {**_GPT2, **{f"{name}.weight": To(f"{_GPT2[name]}.weight", transpose) for name in _CONV1D}},
        top=_GPT2_TOP,
        layers="transformer.h",
    ),
    "gptneox": Architecture(
        _gpt_neox,
        {
            **_BLOOM,
            "attn_qkv": To("attention.query_key_value", group_by_head),
            "attn_output": "attention.dense",
        },
        top={
            "token_embd": "gpt_neox.embed_in",
            "output_norm": "gpt_neox.final_layer_norm",
            "output": "embed_out",
        },
        layers="gpt_neox.layers",
    ),
    "starcoder": Architecture(_starcoder, _GPT2, top=_GPT2_TOP, layers="transformer.h"),
    "bloom": Architecture(
        _bloom,
        _BLOOM,
        top={
            "token_embd": "transformer.word_embeddings",
            "token_embd_norm": "transformer.word_embeddings_layernorm",
            "output_norm": "transformer.ln_f",
            "output": "lm_head",
        },
        layers="transformer.h",
    ),
    "falcon": Architecture(
        _falcon,
        _falcon_block,
        top={**_GPT2_TOP, "token_embd": "transformer.word_embeddings"},
        layers="transformer.h",
    ),
    "mpt": Architecture(
        _mpt,
        {
            "attn_norm": "norm_1",
            "attn_qkv": "attn.Wqkv",
            "attn_output": "attn.out_proj",
            "ffn_norm": "norm_2",
            "ffn_up": "ffn.up_proj",
            "ffn_down": "ffn.down_proj",
        },
        top={**_GPT2_TOP, "output_norm": "transformer.norm_f"},
        layers="transformer.blocks",
    ),
}
