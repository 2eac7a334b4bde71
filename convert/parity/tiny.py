"""Builds tiny random checkpoints of any causal language model in transformers, to measure parity on.

A configuration is shrunk through field names that families share, so model types without an entry here build too. Sizes
are irregular on purpose: axes that a converter may confuse have different lengths.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from convert.parity.tiny_types import TYPES
from tide_jax.errors import TideError

VOCAB = 199
_SIZES: dict[int, str] = {
    48: "hidden_size d_model n_embd emb_dim dim backbone_hidden_size embed_dim",
    5: "num_hidden_layers n_layer n_layers num_layers decoder_layers num_decoder_layers encoder_layers "
    "num_encoder_layers depth num_experts num_local_experts n_routed_experts moe_num_experts",
    6: "num_attention_heads n_head n_heads num_heads attention_heads decoder_attention_heads encoder_attention_heads "
    "num_encoder_attention_heads num_decoder_attention_heads swa_num_attention_heads linear_num_heads",
    2: "num_key_value_heads num_kv_heads kv_n_heads swa_num_key_value_heads num_experts_per_tok num_experts_per_token "
    "moe_topk moe_top_k moe_k top_k_experts num_shared_experts n_shared_experts moe_num_shared_experts",
    12: "head_dim kv_channels d_kv dim_head swa_head_dim attention_head_size linear_head_dim",
    72: "intermediate_size ffn_dim dff dim_ff decoder_ffn_dim encoder_ffn_dim d_inner ffn_hidden_size "
    "dense_intermediate_size ffn_size intermediate_size_mlp prefix_dense_intermediate_size",
    40: "moe_intermediate_size expert_ffn_hidden_size moe_shared_expert_intermediate_size",
    56: "shared_expert_intermediate_size shared_intermediate_size shared_experts_intermediate_size",
    64: "max_position_embeddings n_positions n_ctx max_seq_len model_max_length max_target_positions context_length",
    7: "sliding_window window_size sliding_window_size local_attention attention_window_size",
    VOCAB: "vocab_size decoder_vocab_size vocab_size_per_layer_input",
    16: "kv_lora_rank o_lora_rank",
    20: "q_lora_rank",
    8: "qk_nope_head_dim",
    4: "qk_rope_head_dim",
    10: "v_head_dim",
    100: "n_inner",
    # tokens: those of a test start at 4
    1: "bos_token_id decoder_start_token_id first_k_dense_replace",
    0: "pad_token_id",
}
"""Value for every field with one of these names."""
_COMMON: dict[str, Any] = {name: size for size, names in _SIZES.items() for name in names.split()} | {
    "eos_token_id": 3,
    "tie_word_embeddings": False,
    "is_decoder": True,
    "attention_bias": True,
    "mlp_bias": True,
    "use_bias": True,
    "use_qkv_bias": True,
    "qkv_bias": True,
    "lm_head_bias": True,
}
_COMPUTED = ("slope_rate", "query_decay", "key_decay", "diagonal_decay")
"""Tensors in checkpoints that are functions of the configuration, by the end of their name."""
_LATENT = {"num_key_value_heads": 6, "head_dim": 4}  # multi-head latent attention: one key head per query head


def tiny_config(model_type: str, **overrides: Any) -> Any:
    """A transformers configuration for a model of some thousand weights.

    Args:
      model_type: as in `config.json`.
      overrides: fields to set; a dictionary for a part (``text_config={...}``) overrides that part's fields.

    Raises:
      TideError: transformers does not know the model type.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if model_type not in CONFIG_MAPPING:
        raise TideError(f"model type {model_type!r} is not known to the installed transformers; check the spelling")
    fields = _small_fields(CONFIG_MAPPING[model_type], _merge(TYPES.get(model_type, {}), overrides))
    return CONFIG_MAPPING[model_type](**fields)


def save_tiny(
    model_type: str,
    directory: Path,
    *,
    seed: int = 0,
    dtype: str = "float32",
    max_shard_size: str = "5GB",
    **overrides: Any,
) -> Any:
    """Saves a random model and returns it, read back in float32 and in evaluation mode.

    Weights are large enough to make logits differ, biases are random, and parameters with a constant initial value
    (norms, sinks, gates, correction biases) are spread around it.

    Raises:
      TideError: transformers has no causal language model of the type.
    """
    import torch

    config = tiny_config(model_type, **overrides)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = _random_model(config)
        _randomise(model, torch)
    model.to(getattr(torch, dtype)).save_pretrained(directory, max_shard_size=max_shard_size)
    if type(model.config) is not type(config):  # the model has only the text part, the checkpoint is the whole
        config.architectures = [type(model).__name__]
        config.save_pretrained(directory)
    # Reload the saved model: casting back would keep the rotary frequencies that the first cast rounded.
    return type(model).from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()


def text_type(model_type: str) -> str:
    """Model type of the text decoder inside a multimodal type; for text models the type itself."""
    return tiny_config(model_type).get_text_config(decoder=True).model_type


def _random_model(config: Any) -> Any:
    """The causal language model of a configuration; for a text part, the model class of the whole."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM

    models: Any = MODEL_FOR_CAUSAL_LM_MAPPING
    if type(config) in models:
        return AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    whole_classes = (kind for kind in models if kind.sub_configs.get("text_config") is type(config))
    if (whole := next(whole_classes, None)) is None:
        raise TideError(f"transformers has no causal language model of type {config.model_type!r}")
    return models[whole]._from_config(config, attn_implementation="eager")


def _randomise(model: Any, torch: Any) -> None:
    width = 1.5 * 48**-0.5
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    frozen = {name for name, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad}
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name in frozen or name.endswith(_COMPUTED) or not tensor.is_floating_point() or tensor.numel() == 0:
                continue
            noise = torch.randn(tensor.shape)
            constant = bool((tensor == tensor.flatten()[0]).all())
            if name not in parameters or (not name.endswith("bias") and (constant or tensor.ndim == 1)):
                tensor.add_(0.2 * noise)
            else:
                tensor.copy_(noise * (0.3 if tensor.ndim == 1 else width))


def _small_fields(config_class: Any, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments of a small configuration: common fields, then small parts, then `overrides`."""
    names = [field.name for field in dataclasses.fields(config_class)]
    common = _COMMON | _LATENT if "kv_lora_rank" in names else _COMMON
    fields = {name: common[name] for name in names if name in common}
    for name, part in _part_classes(config_class, overrides).items():
        named = {"model_type": part.model_type} if part.model_type else {}
        fields[name] = _small_fields(part, TYPES.get(part.model_type, {})) | named
    return _merge(fields, overrides)


def _part_classes(config_class: Any, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Configuration classes of a composite model's parts: those named in `overrides`, else the defaults."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    named = {name: (overrides.get(name) or {}).get("model_type") for name in config_class.sub_configs}
    default = None if all(named.values()) else config_class()
    parts = {name: CONFIG_MAPPING[kind] if kind else type(getattr(default, name)) for name, kind in named.items()}
    return {name: part for name, part in parts.items() if part is not type(None)}


def _merge(fields: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Merges `overrides` into `fields`, dictionaries recursively."""
    merged = dict(fields)
    for name, value in overrides.items():
        both = isinstance(value, dict) and isinstance(merged.get(name), dict)
        merged[name] = _merge(merged[name], value) if both else value
    return merged
