"""Tiny random Hugging Face models with awkward sizes, saved to disk the way users have them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

VOCAB = 199
_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "num_hidden_layers": 5,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "intermediate_size": 72,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "eos_token_id": 3,
    "bos_token_id": 1,
    "pad_token_id": 0,
}
_SLIDING = {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "gemma3_text": {
        "head_dim": 16,
        "num_hidden_layers": 6,
        "sliding_window": 7,
        "sliding_window_pattern": 3,
        "query_pre_attn_scalar": 24,
        "final_logit_softcapping": 9.0,
        "rope_scaling": {"rope_type": "linear", "factor": 4.0},
        "tie_word_embeddings": True,
    },
    "gpt2": {"n_inner": 100, "tie_word_embeddings": True, "activation_function": "gelu_new"},
    "gpt_neox": {"rotary_pct": 0.5, "hidden_act": "gelu"},
    "llama": {"head_dim": 10, "attention_bias": True, "mlp_bias": True},
    "mistral": {"head_dim": 12, "sliding_window": 7},
    "mixtral": {"num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": 7},
    "qwen2": {**_SLIDING, "tie_word_embeddings": True},
    "qwen3": {**_SLIDING, "head_dim": 14, "attention_bias": True},
}


def save_tiny(
    model_type: str,
    directory: Path,
    *,
    seed: int = 0,
    dtype: str = "float32",
    max_shard_size: str = "5GB",
    **overrides: Any,
) -> Any:
    """Saves a random model of a family and returns it, in float32 and in evaluation mode.

    Weights are large enough for logits to differ, biases are random, norm weights lie around their default.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(model_type, **(_COMMON | FAMILIES[model_type] | overrides))
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if (parameter.ndim == 1 and "norm" in name) or ".ln_" in name:
                parameter.add_(0.2 * noise)
            else:
                parameter.copy_(noise * (0.3 if parameter.ndim == 1 else 1.5 * config.hidden_size**-0.5))
    model.to(getattr(torch, dtype)).save_pretrained(directory, max_shard_size=max_shard_size)
    # Read back rather than cast back: the cast to a smaller dtype rounded the rotary frequencies too.
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()
