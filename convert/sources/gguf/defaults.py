"""llama.cpp's defaults for keys missing from a GGUF file, as data: architecture -> key -> default.

A missing key means llama.cpp's default, not transformers'. The values come from https://github.com/ggml-org/llama.cpp:
`llama_model_base::load_hparams` in src/llama-model.cpp for `COMMON`, the initial values in src/llama-hparams.h, and
`load_arch_hparams` in src/models/<architecture>.cpp (until 2026 a case of `load_hparams`) for `BY_ARCHITECTURE`. A
default is a value, a function of the file, or `REQUIRED` if llama.cpp refuses the file or cannot run it. Keys that this
package doesn't need, such as `rope.dimension_sections`, may be missing here even if llama.cpp requires them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from tide_jax.errors import TideError

REQUIRED: Any = object()
Defaults = dict[str, Any]


class ReadableKeys(Protocol):
    """What defaults read of a file, see `convert.sources.gguf.hyperparameters.Hyperparameters`."""

    architecture: str
    layers: int
    metadata: Mapping[str, Any]
    tensors: Mapping[str, Any]

    def peek(self, key: str) -> Any:
        """Value of a key, or its default."""
        ...

    def stated_value(self, key: str) -> Any:
        """Value of a key in the file, None if it is missing."""
        ...

    def has(self, *names: str) -> bool:
        """Whether the first layer has a tensor of one of these names."""
        ...

    def raise_missing_key(self, key: str) -> Any:
        """Raises `missing_key_error`."""
        ...

    def missing_key_error(self, key: str) -> TideError:
        """Error for a key that must be present."""
        ...

    def unsupported_error(self, what: str) -> TideError:
        """Error for values that fit no model."""
        ...


def _same_as(key: str) -> Callable[[ReadableKeys], Any]:
    return lambda hp: hp.peek(key)


def _mean_width(hp: ReadableKeys) -> int:
    """Width of a head: model width over number of heads."""
    width = hp.peek("embedding_length") // hp.peek("attention.head_count")
    if width < 1:
        raise hp.unsupported_error("attention.head_count is more than embedding_length, expected less")
    return width


def _required_dense_width(hp: ReadableKeys) -> None:
    """Raises TideError if a tensor needs the missing width, else returns None.

    llama.cpp's default is 0, which fits no dense layer, and no experts without a width of their own.
    """
    if hp.has("*ffn_up.weight") or hp.peek("expert_feed_forward_length") is None:
        raise hp.missing_key_error("feed_forward_length")


def _share_of_experts(hp: ReadableKeys) -> int:
    """Width of an expert: all experts that a token uses are together as wide as the dense layer."""
    return (hp.peek("feed_forward_length") or 0) // max(1, hp.peek("expert_used_count")) or hp.raise_missing_key(
        "expert_feed_forward_length"
    )


def _deepseek_scoring(hp: ReadableKeys) -> int:
    """Softmax as in V2, whose files leave the key out; sigmoids in GLM 4.7 Flash, recognised by its sizes."""
    vocabulary = len(hp.metadata.get("tokenizer.ggml.tokens", ())) or hp.stated_value("vocab_size")
    return 2 if hp.layers in (47, 48) and vocabulary == 154880 else 1


def _shared_experts(hp: ReadableKeys) -> int:
    """Number of shared experts, from the width of their joint matrices."""
    names = (f"blk.{layer}.ffn_up_shexp.weight" for layer in range(hp.layers))
    rows = next((hp.tensors[name].shape[0] for name in names if name in hp.tensors), 0)
    return rows // hp.peek("expert_feed_forward_length")


COMMON: Defaults = {
    "block_count": REQUIRED,
    "nextn_predict_layers": 0,
    "context_length": REQUIRED,
    "embedding_length": REQUIRED,
    "feed_forward_length": _required_dense_width,
    "attention.head_count": REQUIRED,  # 0 would be a model without attention
    "attention.head_count_kv": _same_as("attention.head_count"),
    "attention.key_length": _mean_width,
    "attention.value_length": _mean_width,
    "attention.causal": True,
    "attention.layer_norm_epsilon": REQUIRED,
    "attention.layer_norm_rms_epsilon": REQUIRED,
    "attention.sliding_window": 0,
    "attention.sliding_window_pattern": 0,  # period of layers that see all tokens; 0 means that none does
    "expert_count": 0,
    "expert_used_count": 0,
    "expert_gating_func": 1,  # not in the file: softmax
    "expert_feed_forward_length": None,  # not in the file: experts are as wide as feed_forward_length
    "expert_group_count": 0,
    "expert_group_used_count": 0,
    "expert_weights_scale": 0.0,  # not applied
    "expert_weights_norm": False,
    "expert_shared_count": 0,
    "leading_dense_block_count": 0,
    "rope.dimension_count": _same_as("attention.key_length"),
    "rope.dimension_sections": None,
    "rope.freq_base": 10000.0,
    "rope.freq_base_swa": _same_as("rope.freq_base"),
    "rope.scale_linear": 0.0,
    "rope.scaling.type": "linear",
    "rope.scaling.factor": _same_as("rope.scale_linear"),  # its old name; 0 means 1
    "rope.scaling.attn_factor": 1.0,
    "rope.scaling.original_context_length": _same_as("context_length"),
    "rope.scaling.yarn_ext_factor": -1.0,  # depends on the kind of scaling: 1 for YaRN
    "rope.scaling.yarn_attn_factor": None,
    "rope.scaling.yarn_beta_fast": None,
    "rope.scaling.yarn_beta_slow": None,
    "rope.scaling.yarn_log_multiplier": 0.0,
}

_SSM: Defaults = {
    f"ssm.{name}": REQUIRED for name in ("conv_kernel", "inner_size", "state_size", "time_step_rank", "group_count")
}
_GRANITE: Defaults = {
    "rope.scaling.finetuned": True,
    "logit_scale": REQUIRED,
    "residual_scale": 0.0,  # not applied
    "embedding_scale": 0.0,  # not applied
    "attention.scale": 0.0,  # 1 / sqrt(width of a head)
}
_EXPERT_WIDTHS: Defaults = {"feed_forward_length": None, "expert_feed_forward_length": _share_of_experts}
_SHARED_EXPERT_WIDTH: Defaults = {
    "expert_shared_feed_forward_length": lambda hp: (
        hp.peek("feed_forward_length") or hp.raise_missing_key("expert_shared_feed_forward_length")
    )
}
_EXPERTS_AFTER_DENSE_LAYERS: Defaults = {
    "expert_feed_forward_length": REQUIRED,
    "expert_shared_count": REQUIRED,
}

BY_ARCHITECTURE: dict[str, Defaults] = {
    "mistral3": {"attention.temperature_scale": 0.0},
    "granite": _GRANITE,
    "granitemoe": _GRANITE | {"expert_shared_feed_forward_length": 0},
    "minicpm": {
        "embedding_scale": 12.0,
        "residual_scale": lambda hp: 1.4 * hp.layers**-0.5,
        # llama.cpp has 256 / width but divides by it, the inverse of what the model and its converter mean.
        "logit_scale": lambda hp: hp.peek("embedding_length") / 256,
    },
    "minicpm3": {"attention.q_lora_rank": REQUIRED, "attention.kv_lora_rank": REQUIRED},
    "stablelm": {"use_parallel_residual": lambda hp: not hp.has("ffn_norm.weight")},  # derived from the tensors
    "gptneox": {"use_parallel_residual": REQUIRED},
    "falcon": {"tensor_data_layout": "jploski"},
    "mpt": {"attention.max_alibi_bias": REQUIRED, "attention.clamp_kqv": 0.0},
    "olmo": {"attention.clamp_kqv": 0.0},
    "olmoe": {"attention.clamp_kqv": 0.0},
    "dbrx": {"attention.clamp_kqv": REQUIRED},
    "olmo2": {"attention.sliding_window_pattern": 4},
    "exaone4": {
        "attention.sliding_window": lambda hp: 4096 if hp.layers == 64 else 0,
        "attention.sliding_window_pattern": 4,
    },
    # llama.cpp's converter writes all of these.
    "exaone-moe": _EXPERTS_AFTER_DENSE_LAYERS
    | {
        "attention.sliding_window": REQUIRED,
        "attention.sliding_window_pattern": 4,
        "expert_gating_func": REQUIRED,
    },
    "command-r": {"logit_scale": REQUIRED},
    "cohere2": {
        "attention.sliding_window": REQUIRED,
        "attention.sliding_window_pattern": 4,
        "logit_scale": REQUIRED,
    },
    "gemma2": {
        "attention.sliding_window": 4096,
        "attention.sliding_window_pattern": 2,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
    "gemma3": {
        "attention.sliding_window_pattern": 6,
        "rope.freq_base_swa": 10000.0,
        "attn_logit_softcapping": 0.0,
        "final_logit_softcapping": 0.0,
    },
    "gemma4": {
        "attention.sliding_window": REQUIRED,
        "attention.sliding_window_pattern": REQUIRED,
        "attention.key_length_swa": REQUIRED,
        "attention.value_length_swa": REQUIRED,
        "attention.shared_kv_layers": 0,
        "embedding_length_per_layer_input": REQUIRED,
        "final_logit_softcapping": 30.0,
        "rope.dimension_count_swa": _same_as("rope.dimension_count"),
    },
    "qwen2moe": _EXPERT_WIDTHS | _SHARED_EXPERT_WIDTH,
    "qwen3moe": _EXPERT_WIDTHS,
    "qwen3vlmoe": _EXPERT_WIDTHS,
    "hunyuan-moe": {"feed_forward_length": None, "expert_feed_forward_length": REQUIRED, "expert_shared_count": 1},
    "ernie4_5-moe": {
        "expert_feed_forward_length": REQUIRED,
        "expert_shared_count": _shared_experts,
        "interleave_moe_layer_step": REQUIRED,
        "leading_dense_block_count": REQUIRED,
    },
    "gpt-oss": {
        "feed_forward_length": None,
        "expert_feed_forward_length": REQUIRED,
        "attention.sliding_window": REQUIRED,
        "attention.sliding_window_pattern": 2,
    },
    # llama.cpp reads the scoring function as optional here, but fails without one when it computes the scores.
    "minimax-m2": {"feed_forward_length": None, "expert_feed_forward_length": REQUIRED, "expert_gating_func": REQUIRED},
    "dots1": _EXPERTS_AFTER_DENSE_LAYERS
    | {"expert_gating_func": REQUIRED, "expert_weights_scale": REQUIRED, "leading_dense_block_count": REQUIRED},
    "glm4moe": _EXPERTS_AFTER_DENSE_LAYERS | {"expert_gating_func": 2, "expert_weights_scale": REQUIRED},
    "afmoe": _EXPERTS_AFTER_DENSE_LAYERS | {"expert_gating_func": 2, "attention.sliding_window_pattern": 4},
    "llama4": {
        "feed_forward_length": REQUIRED,
        "expert_feed_forward_length": REQUIRED,
        "interleave_moe_layer_step": REQUIRED,
        "attention.sliding_window": 8192,
    },
    "lfm2": {"shortconv.l_cache": REQUIRED},
    "lfm2moe": {
        "shortconv.l_cache": REQUIRED,
        "expert_feed_forward_length": REQUIRED,
        "expert_gating_func": REQUIRED,
    },
    "mamba": _SSM | {"ssm.dt_b_c_rms": False},
    "mamba2": _SSM,
    "jamba": _SSM,
    "granitehybrid": _SSM | _GRANITE | {"logit_scale": None, "expert_shared_feed_forward_length": 0},
    "falcon-h1": _SSM,
    "nemotron_h": _SSM,
    # llama.cpp always scores these experts by sigmoids.
    "nemotron_h_moe": _SSM
    | {
        "expert_feed_forward_length": REQUIRED,
        "expert_shared_feed_forward_length": REQUIRED,
        "expert_gating_func": 2,
    },
    "qwen3next": _SSM | _EXPERT_WIDTHS | _SHARED_EXPERT_WIDTH | {"full_attention_interval": 4},
    "qwen35": _SSM | {"full_attention_interval": 4},
    "qwen35moe": _SSM | _EXPERT_WIDTHS | _SHARED_EXPERT_WIDTH | {"full_attention_interval": 4},
    "deepseek2": _EXPERTS_AFTER_DENSE_LAYERS
    | {
        "attention.q_lora_rank": None,  # required, except for models recognised by their sizes; here the tensors tell
        "attention.kv_lora_rank": REQUIRED,
        "attention.key_length_mla": _same_as("attention.key_length"),
        "attention.value_length_mla": _same_as("attention.value_length"),
        "expert_gating_func": _deepseek_scoring,
    },
}


def default_value(hp: ReadableKeys, key: str) -> Any:
    """Returns the meaning of a missing key. Raises TideError if the key must be present."""
    entry = BY_ARCHITECTURE.get(hp.architecture, {}).get(key, COMMON.get(key, REQUIRED))
    if entry is REQUIRED:
        raise hp.missing_key_error(key)
    return entry(hp) if callable(entry) else entry
