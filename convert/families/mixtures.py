"""Helpers for the configurations and weight maps of families with experts."""

from __future__ import annotations

from typing import Any

from convert.families.base import first
from convert.weights.parts import OUTSIDE
from convert.weights.rules import Rule, ignore
from tide_jax.model.architecture import MoEConfig

_MTP = "layers that predict further tokens, for speculative decoding"
WITHOUT_MTP = (
    *OUTSIDE,
    ignore(r"(model\.)?mtp[._].*", _MTP),
    Rule(r"model\.layers\.(?P<layer>\d+)\..*", reason=_MTP, past_layers=True),
)
"""`OUTSIDE` for checkpoints with multi-token prediction, which has its own names or comes as layers past the last."""


def mixture(hf: Any, num_experts: int, **flags: Any) -> MoEConfig:
    """The experts of a configuration; `flags` override. Width: `moe_intermediate_size`, else the dense MLP's."""
    fields: dict[str, Any] = {
        "num_experts": num_experts,
        "experts_per_token": first(hf, "num_experts_per_tok"),
        "intermediate_size": first(hf, "moe_intermediate_size", "intermediate_size"),
    }
    return MoEConfig(**(fields | flags))


def corrected(hf: Any, num_experts: int, **flags: Any) -> MoEConfig:
    """DeepSeek-V3's experts: sigmoid scores, a correction for the choice, and groups if the configuration has any."""
    fields: dict[str, Any] = {
        "score": "sigmoid",
        "correction": "score",
        "renormalise": bool(getattr(hf, "norm_topk_prob", True)),
        "scale": float(first(hf, "routed_scaling_factor") or 1.0),
        "groups": first(hf, "n_group") or 1,
        "groups_kept": first(hf, "topk_group") or 1,
    }
    return mixture(hf, num_experts, **(fields | flags))


def several(hf: Any, count: int | None) -> int:
    """Hidden width of `count` shared experts, which form one MLP."""
    return (count or 0) * first(hf, "moe_intermediate_size", "intermediate_size")


def after(hf: Any, dense: int | None) -> tuple[int, ...]:
    """All layers but the first `dense`, which have no experts."""
    return tuple(range(dense or 0, hf.num_hidden_layers))


def sparse_steps(hf: Any) -> tuple[int, ...]:
    """Every `decoder_sparse_step`-th layer except those in `mlp_only_layers`."""
    layers = range(hf.decoder_sparse_step - 1, hf.num_hidden_layers, hf.decoder_sparse_step)
    return tuple(layer for layer in layers if layer not in (hf.mlp_only_layers or ()))


def sparse_types(hf: Any) -> tuple[int, ...]:
    """Layers that `mlp_layer_types` marks as sparse."""
    return tuple(layer for layer, kind in enumerate(hf.mlp_layer_types) if kind == "sparse")
