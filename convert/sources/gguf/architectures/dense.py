"""Llama, and dense architectures that differ from it by a name or two."""

from __future__ import annotations

from typing import Any

import numpy as np

from convert.sources.gguf.architectures.base import (
    ATTENTION,
    LLAMA,
    MLP,
    PERMUTED,
    PERMUTED_WEIGHTS,
    POST_NORMS,
    PRE_NORMS,
    TOP,
    Architecture,
    Names,
    bias_settings,
    decoder,
    expect_attention_only,
    granite_multipliers,
    inner_size,
    layer_norm_eps,
    local_rotary_settings,
    qkv_clamp,
    rms_norm_eps,
    shift_norms,
    window_settings,
)
from convert.sources.gguf.architectures.mixtures import MIXTRAL_EXPERTS, mixtral
from convert.sources.gguf.file import shorten
from convert.sources.gguf.hyperparameters import Hyperparameters
from convert.sources.gguf.tensors import Split, To

Values = dict[str, Any]
_LLAMA_PERMUTED: Names = {**LLAMA, **PERMUTED}
_GLM: Names = {**LLAMA, "ffn_up": "mlp.gate_up_proj"}
_HUNYUAN: Names = {
    **LLAMA,
    "attn_q_norm": "self_attn.query_layernorm",
    "attn_k_norm": "self_attn.key_layernorm",
}


def _llama(hp: Hyperparameters) -> Values:
    """Llama and Mistral, or Mixtral if there are experts."""
    return mixtral(hp) if hp.peek("expert_count") else decoder(hp, "llama", **rms_norm_eps(hp), **bias_settings(hp))


def _exaone(hp: Hyperparameters) -> Values:
    """Llama except for the name; its converter stored the eps of RMS norms as that of LayerNorms."""
    stated = hp.stated_value("attention.layer_norm_epsilon")
    hp.ignore("attention.layer_norm_epsilon")
    eps = hp.stated_value("attention.layer_norm_rms_epsilon") or stated
    values = decoder(hp, "llama", **bias_settings(hp), **({"rms_norm_eps": eps} if eps else rms_norm_eps(hp)))
    hp.ignore("attention.layer_norm_rms_epsilon")
    return values


def _mistral3(hp: Hyperparameters) -> Values:
    """Mistral Small 3.1, or Ministral 3 if queries grow with their position."""
    if not (beta := hp.take("attention.temperature_scale")):
        return decoder(hp, "mistral", **rms_norm_eps(hp), sliding_window=None)
    scale = hp.take("rope.scaling.yarn_log_multiplier")
    values = decoder(hp, "ministral3", **rms_norm_eps(hp))
    scales = {"mscale": scale, "mscale_all_dim": scale} if scale else {}
    values["rope_parameters"] |= {"llama_4_scaling_beta": beta} | scales
    return values


def _qwen(model_type: str) -> Any:
    def config(hp: Hyperparameters) -> Values:
        # For text, all sections of Qwen-VL's rotary embedding have equal positions.
        hp.ignore("rope.dimension_sections", "n_deepstack_layers", "pooling_type")
        return decoder(hp, model_type, **rms_norm_eps(hp), **bias_settings(hp))

    return config


def _granite(hp: Hyperparameters) -> Values:
    hp.ignore("expert_shared_feed_forward_length")
    expect_attention_only(hp)
    width = inner_size(hp)
    return decoder(
        hp, "granite", **rms_norm_eps(hp), **bias_settings(hp), **granite_multipliers(hp), intermediate_size=width
    )


def _minicpm(hp: Hyperparameters) -> Values:
    """Granite under another name. Older files have no multipliers; they get MiniCPM 2B's."""
    values = decoder(hp, "granite", **rms_norm_eps(hp), **bias_settings(hp))
    return values | {
        "attention_multiplier": values["head_dim"] ** -0.5,
        "embedding_multiplier": hp.take("embedding_scale") or 1.0,
        "residual_multiplier": hp.take("residual_scale") or 1.0,
        "logits_scaling": hp.take("logit_scale"),
    }


def _glm(hp: Hyperparameters) -> Values:
    return decoder(hp, "glm", **rms_norm_eps(hp), **bias_settings(hp), partial=True)


def _glm4(hp: Hyperparameters) -> Values:
    hp.expect("rope.dimension_sections", None)
    return decoder(hp, "glm4", **rms_norm_eps(hp), **bias_settings(hp), partial=True)


def _phi3(hp: Hyperparameters) -> Values:
    window = hp.take("attention.sliding_window") or None
    values = decoder(hp, "phi3", **rms_norm_eps(hp), partial=True)
    original = values["rope_parameters"].get("original_max_position_embeddings", values["max_position_embeddings"])
    return values | {"sliding_window": window, "original_max_position_embeddings": original}


def _phi2(hp: Hyperparameters) -> Values:
    return decoder(
        hp, "phi", **layer_norm_eps(hp), intermediate_size=inner_size(hp), hidden_act="gelu_new", partial=True
    )


def _query_key_value(c: Any) -> tuple[int, ...]:
    heads, kv = c["num_attention_heads"], c["num_key_value_heads"]
    return tuple(count * c["head_dim"] for count in (heads, kv, kv))


def _stablelm(hp: Hyperparameters) -> Values:
    return decoder(
        hp,
        "stablelm",
        **layer_norm_eps(hp),
        use_parallel_residual=hp.take("use_parallel_residual"),
        use_qkv_bias=hp.has("attn_q.bias"),
        qk_layernorm=hp.has("attn_q_norm.weight"),
        partial=True,
    )


def _starcoder2(hp: Hyperparameters) -> Values:
    return decoder(
        hp,
        "starcoder2",
        **layer_norm_eps(hp, "norm_epsilon"),
        hidden_act="gelu_pytorch_tanh",
        use_bias=hp.has("attn_q.bias"),
        sliding_window=None,
    )


def _olmo(hp: Hyperparameters) -> Values:
    hp.expect("attention.layer_norm_epsilon", 1e-5)
    return decoder(hp, "olmo", **bias_settings(hp), clip_qkv=qkv_clamp(hp))


def _olmo2(hp: Hyperparameters) -> Values:
    """OLMo 2, or OLMo 3 if there is a window."""
    window = window_settings(hp)
    if window["sliding_window"] is None:
        return decoder(hp, "olmo2", **rms_norm_eps(hp), **bias_settings(hp))
    local = local_rotary_settings(hp)
    values = decoder(hp, "olmo3", **rms_norm_eps(hp), **bias_settings(hp), **window)
    return values | {"rope_parameters": {"full_attention": values["rope_parameters"], "sliding_attention": local}}


def _exaone4(hp: Hyperparameters) -> Values:
    window = window_settings(hp)
    return decoder(hp, "exaone4", **rms_norm_eps(hp), **window)


def _smollm3(hp: Hyperparameters) -> Values:
    """SmolLM3: every fourth layer has no rotary embedding."""
    no_rope = [int((layer + 1) % 4 != 0) for layer in range(hp.layers)]
    return decoder(hp, "smollm3", **rms_norm_eps(hp), **bias_settings(hp), no_rope_layers=no_rope)


def _cohere(hp: Hyperparameters) -> Values:
    scale = {"logit_scale": hp.take("logit_scale"), "use_qk_norm": hp.has("attn_q_norm.weight")}
    return decoder(hp, "cohere", **layer_norm_eps(hp), **bias_settings(hp), **scale)


def _cohere2(hp: Hyperparameters) -> Values:
    scale = hp.take("logit_scale")
    return decoder(hp, "cohere2", **layer_norm_eps(hp), **bias_settings(hp), **window_settings(hp), logit_scale=scale)


def _nemotron(hp: Hyperparameters) -> Values:
    hp.ignore("attention.layer_norm_rms_epsilon")
    return decoder(
        hp, "nemotron", **layer_norm_eps(hp, "norm_eps"), **bias_settings(hp), hidden_act="relu2", partial=True
    )


def _arcee(hp: Hyperparameters) -> Values:
    hp.ignore("pooling_type")
    return decoder(hp, "arcee", **rms_norm_eps(hp), **bias_settings(hp), hidden_act="relu2")


def _jais2(hp: Hyperparameters) -> Values:
    return decoder(hp, "jais2", **layer_norm_eps(hp), **bias_settings(hp), hidden_act="relu2")


def _seed_oss(hp: Hyperparameters) -> Values:
    out = hp.has("attn_output.bias")
    return decoder(hp, "seed_oss", **rms_norm_eps(hp), **bias_settings(hp), attention_out_bias=out)


def _ernie4_5(hp: Hyperparameters) -> Values:
    return decoder(hp, "ernie4_5", **rms_norm_eps(hp), use_bias=hp.has("attn_q.bias"))


def _hunyuan(hp: Hyperparameters) -> Values:
    return decoder(hp, "hunyuan_v1_dense", **rms_norm_eps(hp), **bias_settings(hp))


def _apertus(hp: Hyperparameters) -> Values:
    return decoder(hp, "apertus", **rms_norm_eps(hp), **bias_settings(hp), hidden_act="xielu")


def _xielu(hp: Hyperparameters) -> dict[str, np.ndarray]:
    """Parameters of Apertus' learned activation: the file has a list over layers for each."""
    tensors = {}
    for name, shape in (("alpha_p", (1,)), ("alpha_n", (1,)), ("beta", ()), ("eps", ())):
        values = hp.metadata.get(f"xielu.{name}")
        if isinstance(values, float):  # one value for all layers
            values = [values] * hp.layers
        if not isinstance(values, list) or len(values) != hp.layers:
            raise hp.unsupported_error(f"xielu.{name} is {shorten(values)}, expected {hp.layers} numbers")
        for layer, value in enumerate(values):
            tensors[f"model.layers.{layer}.mlp.act_fn.{name}"] = np.full(shape, value, np.float32)
    return tensors


ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(_llama, {**_LLAMA_PERMUTED, **MIXTRAL_EXPERTS}),
    "internlm2": Architecture(_llama, _LLAMA_PERMUTED),
    "exaone": Architecture(_exaone, LLAMA),
    "mistral3": Architecture(_mistral3, _LLAMA_PERMUTED),
    "qwen2": Architecture(_qwen("qwen2"), LLAMA),
    "qwen2vl": Architecture(_qwen("qwen2"), LLAMA),
    "qwen3": Architecture(_qwen("qwen3"), LLAMA),
    "qwen3vl": Architecture(_qwen("qwen3"), LLAMA),
    "granite": Architecture(_granite, _LLAMA_PERMUTED),
    "minicpm": Architecture(_minicpm, _LLAMA_PERMUTED),
    "chatglm": Architecture(_glm, _GLM),
    "glm4": Architecture(
        _glm4,
        {**_GLM, "post_attention_norm": "post_self_attn_layernorm", "post_ffw_norm": "post_mlp_layernorm"},
    ),
    "phi2": Architecture(
        _phi2,
        {
            **LLAMA,
            "attn_output": "self_attn.dense",
            "attn_qkv": Split(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), _query_key_value),
            "ffn_up": "mlp.fc1",
            "ffn_down": "mlp.fc2",
        },
        top={**TOP, "output_norm": "model.final_layernorm"},
    ),
    "phi3": Architecture(_phi3, _GLM),
    "stablelm": Architecture(
        _stablelm,
        {
            **LLAMA,
            "attn_q_norm": To("self_attn.q_layernorm.norms.{i}"),
            "attn_k_norm": To("self_attn.k_layernorm.norms.{i}"),
        },
    ),
    "starcoder2": Architecture(_starcoder2, {**LLAMA, "ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"}),
    "olmo": Architecture(_olmo, {**LLAMA, **PERMUTED_WEIGHTS}),
    "olmo2": Architecture(_olmo2, {**ATTENTION, **MLP, **POST_NORMS}),
    "exaone4": Architecture(_exaone4, {**ATTENTION, **MLP, **POST_NORMS}),
    "smollm3": Architecture(_smollm3, _LLAMA_PERMUTED),
    "command-r": Architecture(_cohere, LLAMA),
    "cohere2": Architecture(_cohere2, LLAMA),
    "nemotron": Architecture(_nemotron, shift_norms(LLAMA, *PRE_NORMS), top=shift_norms(TOP, "output_norm")),
    "arcee": Architecture(_arcee, _LLAMA_PERMUTED),
    "jais2": Architecture(_jais2, LLAMA),
    "seed_oss": Architecture(_seed_oss, {**LLAMA, "post_attention_norm": "post_attention_layernorm"}),
    "ernie4_5": Architecture(_ernie4_5, LLAMA),
    "hunyuan-dense": Architecture(_hunyuan, _HUNYUAN),
    "apertus": Architecture(
        _apertus,
        {**LLAMA, "attn_norm": "attention_layernorm", "ffn_norm": "feedforward_layernorm"},
        constants=_xielu,
    ),
}
