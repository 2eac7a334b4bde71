"""Helpers for the configurations and weight maps of families with experts."""

from __future__ import annotations

from typing import Any

from convert.families.base import first_set
from convert.families.numbers import count
from convert.weights.parts import OUTER_RULES
from convert.weights.rules import Rule, ignore
from tide_jax.model.architecture import MoEConfig

_MTP_REASON = "layers that predict further tokens, for speculative decoding"
WITHOUT_MTP = (
    *OUTER_RULES,
    ignore(r"(model\.)?mtp[._].*", _MTP_REASON),
    Rule(r"model\.layers\.(?P<layer>\d+)\..*", reason=_MTP_REASON, past="layer"),
)
"""`OUTER_RULES` for checkpoints with multi-token prediction, which has its own names or comes as extra last layers."""


def mixture(hf: Any, num_experts: int, **flags: Any) -> MoEConfig:
    """The experts of a configuration; `flags` override. Width: `moe_intermediate_size`, else the dense MLP's."""
    fields: dict[str, Any] = {
        "num_experts": num_experts,
        "experts_per_token": first_set(hf, "num_experts_per_tok"),
        "intermediate_size": first_set(hf, "moe_intermediate_size", "intermediate_size"),
    }
    return MoEConfig(**(fields | flags))


def sigmoid_mixture(hf: Any, num_experts: int, **flags: Any) -> MoEConfig:
    """DeepSeek-V3's experts: sigmoid scores, a correction for the choice, and groups if the configuration has any."""
    fields: dict[str, Any] = {
        "score": "sigmoid",
        "correction": "score",
        "renormalise": bool(getattr(hf, "norm_topk_prob", True)),
        "scale": float(first_set(hf, "routed_scaling_factor") or 1.0),
        "groups": first_set(hf, "n_group") or 1,
        "groups_kept": first_set(hf, "topk_group") or 1,
    }
    return mixture(hf, num_experts, **(fields | flags))


def shared_width(hf: Any, count: int | None) -> int:
    """Hidden width of `count` shared experts, which form one MLP."""
    return (count or 0) * first_set(hf, "moe_intermediate_size", "intermediate_size")


def layers_after(hf: Any, dense: int | None) -> tuple[int, ...]:
    """All layers but the first `dense`, which have no experts."""
    return tuple(range(dense or 0, hf.num_hidden_layers))


def sparse_step_layers(hf: Any) -> tuple[int, ...]:
    """Every `decoder_sparse_step`-th layer except those in `mlp_only_layers`."""
    step = count(hf, "decoder_sparse_step")
    layers = range(step - 1, hf.num_hidden_layers, step)
    return tuple(layer for layer in layers if layer not in (hf.mlp_only_layers or ()))


def marked_sparse_layers(hf: Any) -> tuple[int, ...]:
    """Layers that `mlp_layer_types` marks as sparse."""
    return tuple(layer for layer, kind in enumerate(hf.mlp_layer_types) if kind == "sparse")
