"""Types and ranges of values in a GGUF file, checked before anything is computed or allocated from them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, StrictBool, StrictFloat, StrictInt, StrictStr, TypeAdapter, ValidationError

from convert.sources.gguf.file import shorten
from tide_jax.errors import TideError

Count = Annotated[StrictInt, Field(ge=0, lt=2**31)]
Layers = Annotated[StrictInt, Field(ge=0, lt=2**16)]
Size = Annotated[StrictInt, Field(ge=1, le=2**24)]
Width = Annotated[StrictInt, Field(ge=1, le=2**16)]
Finite = Annotated[StrictFloat, Field(allow_inf_nan=False)]
Factor = Annotated[StrictFloat, Field(allow_inf_nan=False, ge=0.0, le=1e9)]
Positive = Annotated[StrictFloat, Field(allow_inf_nan=False, gt=0.0, le=1e15)]
Epsilon = Annotated[StrictFloat, Field(gt=0.0, lt=1.0)]

# Checked for a single value, or for each entry of a list over layers.
HYPERPARAMETERS: dict[str, Any] = {
    "block_count": Annotated[StrictInt, Field(ge=1, lt=2**16)],
    "context_length": Annotated[StrictInt, Field(ge=1, lt=2**31)],
    **dict.fromkeys(("embedding_length", "vocab_size", "ssm.inner_size"), Size),
    **dict.fromkeys(
        (
            "nextn_predict_layers",
            "leading_dense_block_count",
            "interleave_moe_layer_step",
            "attention.shared_kv_layers",
            "expert_count",
            "expert_used_count",
            "expert_group_count",
            "expert_group_used_count",
            "expert_shared_count",
            "expert_gating_func",
        ),
        Layers,
    ),
    **dict.fromkeys(
        (
            "feed_forward_length",
            "expert_feed_forward_length",
            "expert_shared_feed_forward_length",
            "embedding_length_per_layer_input",
            "attention.q_lora_rank",
        ),
        Annotated[StrictInt, Field(ge=0, le=2**24)],
    ),
    **dict.fromkeys(
        (
            "attention.head_count",
            "attention.head_count_kv",
            "attention.key_length",
            "attention.key_length_mla",
            "attention.key_length_swa",
            "attention.value_length",
            "attention.value_length_mla",
            "attention.value_length_swa",
            "attention.kv_lora_rank",
            "rope.dimension_count",
            "rope.dimension_count_swa",
            "full_attention_interval",
            "shortconv.l_cache",
            *(f"ssm.{name}" for name in ("conv_kernel", "group_count", "state_size", "time_step_rank")),
        ),
        Width,
    ),
    "attention.causal": StrictBool,
    **dict.fromkeys(("attention.layer_norm_epsilon", "attention.layer_norm_rms_epsilon"), Epsilon),
    "attention.sliding_window": Count,
    "attention.sliding_window_pattern": StrictBool | Count,
    **dict.fromkeys(
        (
            "attention.scale",
            "attention.temperature_scale",
            "attention.clamp_kqv",
            "attention.max_alibi_bias",
            "attn_logit_softcapping",
            "final_logit_softcapping",
            "embedding_scale",
            "residual_scale",
            "expert_weights_scale",
            "rope.scale_linear",
            "rope.scaling.factor",
            "rope.scaling.yarn_log_multiplier",
        ),
        Factor,
    ),
    **dict.fromkeys(
        (
            "logit_scale",
            "rope.freq_base",
            "rope.freq_base_swa",
            "rope.scaling.attn_factor",
            "rope.scaling.yarn_attn_factor",
            "rope.scaling.yarn_beta_fast",
            "rope.scaling.yarn_beta_slow",
        ),
        Positive,
    ),
    "rope.scaling.yarn_ext_factor": Finite,
    "rope.scaling.original_context_length": Count,
    "rope.scaling.type": StrictStr,
    "rope.dimension_sections": Finite | StrictInt,
    **dict.fromkeys(
        ("expert_weights_norm", "rope.scaling.finetuned", "ssm.dt_b_c_rms", "use_parallel_residual"), StrictBool
    ),
    "tensor_data_layout": StrictStr,
}
# In these architectures, layers without attention have 0 heads.
_RECURRENT = frozenset(("granitehybrid", "jamba", "lfm2", "lfm2moe", "mamba", "mamba2", "nemotron_h", "nemotron_h_moe"))
_HEADS: dict[str, TypeAdapter[Any]] = dict.fromkeys(
    ("attention.head_count", "attention.head_count_kv"), TypeAdapter(Layers)
)
_TOKEN = "tokenizer.ggml."
# Checked for the whole value.
GENERAL: dict[str, Any] = {
    "general.architecture": StrictStr,
    "tokenizer.chat_template": StrictStr,
    **dict.fromkeys((f"{_TOKEN}model", f"{_TOKEN}pre"), StrictStr),
    **dict.fromkeys((f"{_TOKEN}tokens", f"{_TOKEN}merges"), list[StrictStr]),
    f"{_TOKEN}token_type": list[StrictInt],
    f"{_TOKEN}scores": list[Finite],
    **dict.fromkeys(
        (
            f"{_TOKEN}{name}"
            for name in ("add_bos_token", "add_eos_token", "add_space_prefix", "remove_extra_whitespaces")
        ),
        StrictBool,
    ),
    **dict.fromkeys((f"xielu.{name}" for name in ("alpha_p", "alpha_n", "beta", "eps")), list[Finite] | Finite),
}
_CHECKS = {name: TypeAdapter(kind) for name, kind in (HYPERPARAMETERS | GENERAL).items()}
_TOKEN_ID = TypeAdapter(Count)


def check_values(path: Path, architecture: str, metadata: Mapping[str, Any]) -> None:
    """Raises TideError if the value of a known key has another type or is outside any model's range."""
    prefix = f"{architecture}."
    for key, value in metadata.items():
        name = key.removeprefix(prefix) if key.startswith(prefix) else key
        if key.startswith(_TOKEN) and key.endswith("_token_id"):
            _check_value(path, key, _TOKEN_ID, value)
        elif key in GENERAL:
            _check_value(path, key, _CHECKS[key], value)
        elif name != key and name in HYPERPARAMETERS:
            if value == []:
                raise TideError(f"{path} has {shorten(key)}=[], expected a value; get the file again")
            kind = _HEADS.get(name) if architecture in _RECURRENT else None
            for one in value if isinstance(value, list) else (value,):
                _check_value(path, key, kind or _CHECKS[name], one)


def _check_value(path: Path, key: str, kind: TypeAdapter[Any], value: Any) -> None:
    try:
        kind.validate_python(value)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        where = "".join(f"[{place}]" for place in problem["loc"] if isinstance(place, int))
        raise TideError(
            f"{path} has {shorten(key)}{where}={shorten(problem['input'], 40)}: {shorten(problem['msg'], 80)}; get the "
            "file again"
        ) from None
