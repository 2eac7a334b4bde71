"""Helpers for the table of architectures: name tables, inverse arrangements and configuration values."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from convert.sources.gguf.defaults import default_value
from convert.sources.gguf.hyperparameters import Hyperparameters
from convert.sources.gguf.rope import rope_parameters
from convert.sources.gguf.tensors import Config, Place, To, Undo

Names = Mapping[str, Place]


@dataclasses.dataclass(frozen=True)
class Architecture:
    """Mapping of one GGUF architecture to a Hugging Face model.

    Attributes:
      config: maps hyperparameters to config.json without token ids, including `model_type`.
      block: name inside `blk.N.` -> place inside a layer; a module's name stands for its weight and its bias. A
        function of the hyperparameters if the names depend on the file.
      top: name of a module or tensor outside the layers -> place, or a function of the hyperparameters.
      layers: prefix of the checkpoint's layers.
      constants: tensors of the checkpoint, by name, that a file stores as hyperparameters.
    """

    config: Callable[[Hyperparameters], dict[str, Any]]
    block: Names | Callable[[Hyperparameters], Names]
    top: Names | Callable[[Hyperparameters], Names] = dataclasses.field(default_factory=lambda: TOP)
    layers: str = "model.layers"
    constants: Callable[[Hyperparameters], dict[str, np.ndarray]] = lambda hp: {}


# -------------------------------------------------------------------------------------------------------------- names

TOP: Names = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
ATTENTION: Names = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
}
MLP: Names = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
EXPERTS: Names = {
    "ffn_gate_inp": "mlp.gate",
    "exp_probs_b.bias": "mlp.gate.e_score_correction_bias",
    "ffn_gate_exps": To("mlp.experts.{i}.gate_proj"),
    "ffn_up_exps": To("mlp.experts.{i}.up_proj"),
    "ffn_down_exps": To("mlp.experts.{i}.down_proj"),
    "ffn_gate_shexp": "mlp.shared_experts.gate_proj",
    "ffn_up_shexp": "mlp.shared_experts.up_proj",
    "ffn_down_shexp": "mlp.shared_experts.down_proj",
}
PRE_NORMS: Names = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
POST_NORMS: Names = {
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
LLAMA: Names = {**PRE_NORMS, **ATTENTION, **MLP}


# ------------------------------------------------------------------------------------------------ arrangements to undo


def undo_rotary_pairs(heads: str) -> Undo:
    """Reorders rows [heads, half, 2] back to [heads, 2, half], flattened.

    llama.cpp rotates neighbouring rows of a head together, transformers row i with row ``i + half``.
    """

    def undo(a: np.ndarray, c: Config) -> np.ndarray:
        pairs = a.reshape(c[heads], -1, 2, *a.shape[1:])
        return pairs.swapaxes(1, 2).reshape(a.shape)

    return undo


def subtract_one(a: np.ndarray, c: Config) -> np.ndarray:
    """Undoes the added one in norms of the form ``1 + weight``."""
    return a - np.ones((), a.dtype)


def transpose(a: np.ndarray, c: Config) -> np.ndarray:
    """Swaps the axes of a matrix."""
    return a.T


def group_by_head(a: np.ndarray, c: Config) -> np.ndarray:
    """Reorders rows [(q, k, v), heads, head_dim] to [heads, (q, k, v), head_dim], flattened."""
    parts = a.reshape(3, c["num_attention_heads"], -1, *a.shape[1:])
    return parts.swapaxes(0, 1).reshape(a.shape)


PERMUTED: Names = {
    "attn_q": To("self_attn.q_proj", undo_rotary_pairs("num_attention_heads")),
    "attn_k": To("self_attn.k_proj", undo_rotary_pairs("num_key_value_heads")),
}
PERMUTED_WEIGHTS: Names = {
    "attn_q.weight": To("self_attn.q_proj.weight", undo_rotary_pairs("num_attention_heads")),
    "attn_k.weight": To("self_attn.k_proj.weight", undo_rotary_pairs("num_key_value_heads")),
}


def shift_norms(names: Names, *modules: str) -> Names:
    """`names`, with one subtracted from the weights of the norms in `modules`."""
    return {**names, **{f"{module}.weight": To(f"{names[module]}.weight", subtract_one) for module in modules}}


# ------------------------------------------------------------------------------------------------ configuration values


def decoder(
    hp: Hyperparameters,
    model_type: str,
    *,
    partial: bool = False,
    head_dim: int | None = None,
    rope: dict[str, Any] | None = None,
    without: tuple[str, ...] = (),
    **fields: Any,
) -> dict[str, Any]:
    """Returns the values that nearly every config.json has; `fields` override.

    Args:
      partial: the family may rotate only a part of a head's channels.
      head_dim: config.json's value, if it is not the width of every head.
      rope: rotary settings, if they are not the usual ones.
      without: values the family does not have.
    """
    hidden, heads, context = hp.take("embedding_length"), hp.take("attention.head_count"), hp.take("context_length")
    if head_dim is None:
        head_dim = hp.take("attention.key_length")
        hp.expect("attention.value_length", head_dim)
    hp.expect("attention.causal", True)
    if (window := hp.take_once("attention.sliding_window")) and window < context:
        raise hp.unsupported_error(
            f"attention.sliding_window={window}: not supported, expected attention to all tokens"
        )
    if count := hp.take_once("expert_count"):
        raise hp.unsupported_error(f"expert_count={count}: not supported, expected 0")
    hp.ignore("vocab_size", "attention.sliding_window_pattern", "expert_used_count")
    common = {
        "model_type": model_type,
        "vocab_size": vocab_size(hp),
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": hp.take_once("feed_forward_length") or None,
        "num_hidden_layers": hp.layers,
        "num_attention_heads": heads,
        "num_key_value_heads": hp.take_once("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": context,
        "rope_parameters": rotary_settings(hp, head_dim, context, partial) if rope is None else rope,
        "tie_word_embeddings": "output.weight" not in hp.tensors,
    }
    return {name: value for name, value in common.items() if value is not None and name not in without} | fields


def vocab_size(hp: Hyperparameters) -> int:
    """Number of rows of the embedding. Raises TideError if it is missing."""
    embedding = hp.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise hp.unsupported_error("token_embd.weight is missing, expected a whole language model")
    return embedding.shape[0]


def rotary_settings(hp: Hyperparameters, head_dim: int, context: int, partial: bool) -> dict[str, Any]:
    """Rotary settings. Raises TideError if only a part of each head is rotated and the family rotates all of it."""
    width = hp.take("rope.dimension_count")
    if width != head_dim and not partial:
        raise hp.unsupported_error(f"rope.dimension_count={width}: expected the head width {head_dim}")
    rope = rope_parameters(hp, width, context)
    if (local := hp.take_once("rope.freq_base_swa", rope["rope_theta"])) != rope["rope_theta"]:
        raise hp.unsupported_error(f"rope.freq_base_swa={local}: not supported, expected {rope['rope_theta']}")
    # Set it even for whole heads: some families' configurations rotate only a part by default.
    return rope | {"partial_rotary_factor": _rotated_share(width, head_dim)} if partial else rope


def _rotated_share(part: int, whole: int) -> float:
    """The fraction that gives `part` when its product with `whole` is truncated to an integer."""
    share = part / whole
    return share if int(whole * share) == part else math.nextafter(share, math.inf)


def rms_norm_eps(hp: Hyperparameters) -> dict[str, Any]:
    """The eps of RMS norms."""
    return {"rms_norm_eps": hp.take("attention.layer_norm_rms_epsilon")}


def layer_norm_eps(hp: Hyperparameters, name: str = "layer_norm_eps") -> dict[str, Any]:
    """The eps of LayerNorms, under the family's name for it."""
    return {name: hp.take("attention.layer_norm_epsilon")}


def bias_settings(hp: Hyperparameters) -> dict[str, Any]:
    """Llama's bias switches."""
    return {"attention_bias": hp.has("attn_q.bias", "attn_qkv.bias"), "mlp_bias": hp.has("ffn_up.bias")}


def granite_multipliers(hp: Hyperparameters) -> dict[str, Any]:
    """Granite's multipliers; in a file 0 means not applied."""
    return {
        "attention_multiplier": hp.take("attention.scale") or hp.peek("attention.key_length") ** -0.5,
        "embedding_multiplier": hp.take("embedding_scale") or 1.0,
        "residual_multiplier": hp.take("residual_scale") or 1.0,
        "logits_scaling": hp.take("logit_scale"),
    }


def expect_attention_only(hp: Hyperparameters) -> None:
    """Raises TideError for a Granite without rotary embedding, which its converter marks as not fine-tuned.

    Models that could have had state-space layers have those layers' sizes in their files; they are ignored.
    """
    hp.expect("rope.scaling.finetuned", True)
    sizes = ("conv_kernel", "state_size", "group_count", "inner_size", "time_step_rank")
    hp.ignore(*(f"ssm.{name}" for name in sizes))


def local_rotary_settings(hp: Hyperparameters) -> dict[str, Any]:
    """Rotary settings of layers with a window, which have no scaling."""
    return {"rope_type": "default", "rope_theta": hp.take("rope.freq_base_swa")}


def qkv_clamp(hp: Hyperparameters) -> float | None:
    """Limit at which queries, keys and values are clipped; None if there is none, which is 0 in a file."""
    return hp.take("attention.clamp_kqv") or None


def inner_size(hp: Hyperparameters) -> int:
    """Hidden width of an MLP without a gate, from its matrix: the converter writes four times the model's width."""
    stated = hp.take_once("feed_forward_length")
    up = hp.tensors.get("blk.0.ffn_up.weight")
    return stated if up is None else up.shape[0]


def window_settings(hp: Hyperparameters) -> dict[str, Any]:
    """The window and the layers that use it: those in a list, or all layers but the last of each period."""
    window = hp.take("attention.sliding_window")
    pattern = hp.take_list("attention.sliding_window_pattern")
    if not window:
        return {"sliding_window": None, "layer_types": ["full_attention"] * hp.layers}
    if isinstance(pattern, bool) or (isinstance(pattern, list) and len(pattern) < hp.layers):
        problem = f"attention.sliding_window_pattern is neither a period nor a list of {hp.layers} layers"
        raise hp.unsupported_error(problem)
    if isinstance(pattern, list):
        slides = [bool(flag) for flag in pattern[: hp.layers]]
    else:
        slides = [not pattern or layer % pattern < pattern - 1 for layer in range(hp.layers)]
    kinds = ["sliding_attention" if slide else "full_attention" for slide in slides]
    return {"sliding_window": window, "layer_types": kinds}


def expert_settings(hp: Hyperparameters, count: str = "num_experts", *, scores: str = "softmax") -> dict[str, Any]:
    """Number of experts, number per token, and width.

    Args:
      count: config.json's name for the number of experts.
      scores: the only scoring function of the family, "softmax" or "sigmoid".
    """
    number, found = {"softmax": 1, "sigmoid": 2}[scores], scoring_function(hp)
    if found != number:
        raise hp.unsupported_error(f"expert_gating_func={found}: not supported, expected {number}")
    total, used, width = hp.take("expert_count"), hp.take("expert_used_count"), hp.take("expert_feed_forward_length")
    if not 1 <= used <= total:
        raise hp.unsupported_error(
            f"expert_used_count={used}: not supported with expert_count={total}, expected 1 or more of them"
        )
    return {
        count: total,
        "num_experts_per_tok": used,
        **({} if width is None else {"moe_intermediate_size": width}),
    }


def scoring_function(hp: Hyperparameters) -> int:
    """llama.cpp's number for the function that scores experts: 1 softmax, 2 sigmoid; 0 in a file means the default."""
    return hp.take("expert_gating_func") or default_value(hp, "expert_gating_func")


def expert_groups(hp: Hyperparameters) -> dict[str, Any]:
    """Number of groups of experts and how many of them a token uses; 1 and 1 if there are no groups."""
    return {
        "n_group": hp.take("expert_group_count") or 1,
        "topk_group": hp.take("expert_group_used_count") or 1,
    }


def routed_scale(hp: Hyperparameters) -> float:
    """Factor of the experts' sum; 0 in a file means 1."""
    return hp.take("expert_weights_scale") or 1.0
