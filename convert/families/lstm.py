"""xLSTM, whose layers have exponential gates and a matrix for each head (Beck et al. 2025, arXiv:2503.13427)."""

from __future__ import annotations

from typing import Any

from convert.families.base import Family, require
from convert.families.numbers import count, positive
from convert.families.recurrent import without_attention
from convert.weights import takes
from convert.weights.parts import layer_rules, linear, mlp, norm, outer_rules
from convert.weights.recurrent_parts import matrix_lstm
from tide_jax.model.architecture import DecoderConfig
from tide_jax.model.architecture_parts import check_multiple
from tide_jax.model.recurrent.types import MatrixLSTMType


def _head_dim(hf: Any, factor: str) -> int:
    """Channels of a head, where the factor gives those of all heads."""
    channels, heads = int(hf.hidden_size * positive(hf, factor)), count(hf, "num_heads")
    check_multiple(f"hidden_size * {factor}", channels, "num_heads", heads)
    return channels // heads


def _xlstm(hf: Any) -> DecoderConfig:
    require(hf, use_bias=False, num_blocks=hf.num_hidden_layers, embedding_dim=hf.hidden_size)
    kind = MatrixLSTMType(
        heads=count(hf, "num_heads"),
        key_dim=_head_dim(hf, "qk_dim_factor"),
        value_dim=_head_dim(hf, "v_dim_factor"),
        gate_softcap=positive(hf, "gate_soft_cap"),
        eps=hf.eps,
        norm_eps=hf.norm_eps,
    )
    step = count(hf, "ffn_round_up_to_multiple_of")
    return without_attention(
        hf,
        kind,
        intermediate_size=int((hf.hidden_size * positive(hf, "ffn_proj_factor") + step - 1) // step) * step,
        mlp_layers=None,
        logit_softcap=hf.output_logit_soft_cap,
    )


XLSTM = (
    *outer_rules("[backbone.]embeddings", "[backbone.]out_norm"),
    *layer_rules(
        "[backbone.]blocks",
        norm("norm_mlstm", "pre_attention_norm"),
        matrix_lstm("mlstm_layer"),
        norm("norm_ffn", "pre_mlp_norm"),
        mlp("ffn", "mlp", "proj_up_gate", "proj_up", "proj_down"),
        linear("ffn.proj_up_gate_z", "mlp.gate_up", takes.halves),
    ),
)
FAMILIES: dict[str, Family] = {"xlstm": Family(_xlstm, XLSTM)}
