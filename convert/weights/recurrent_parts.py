"""Tables of checkpoint names for recurrent layers; see `convert.weights.parts`."""

from __future__ import annotations

from convert.weights import recurrent_takes, takes
from convert.weights.parts import Names, linear, norm
from convert.weights.rules import Target
from tide_jax.model.recurrent.types import KimiDeltaType, LightningType, MatrixLSTMType


def short_conv(name: str) -> Names:
    """A gated short convolution."""
    return {
        **linear(f"{name}.in_proj", "recurrent.inputs", recurrent_takes.thirds, recurrent_takes.thirds),
        f"{name}.conv.weight": (Target("recurrent.filters", recurrent_takes.filters),),
        f"{name}.conv.bias": (Target("recurrent.filter_bias"),),
        **linear(f"{name}.out_proj", "recurrent.out"),
    }


def _mamba(name: str) -> Names:
    """What both generations of Mamba have."""
    return {
        f"{name}.conv1d.weight": (Target("recurrent.filters", recurrent_takes.filters),),
        f"{name}.conv1d.bias": (Target("recurrent.filter_bias"),),
        f"{name}.A_log": (Target("recurrent.fade"),),
        f"{name}.D": (Target("recurrent.passed"),),
        **linear(f"{name}.out_proj", "recurrent.out"),
    }


def selective(name: str) -> Names:
    """Mamba, with Jamba's norms."""
    return {
        **_mamba(name),
        **linear(f"{name}.in_proj", "recurrent.stream_gate", takes.halves, takes.halves),
        **linear(f"{name}.x_proj", "recurrent.parts"),
        f"{name}.dt_proj.weight": (Target("recurrent.step.kernel", takes.transpose),),
        f"{name}.dt_proj.bias": (Target("recurrent.step_bias"),),
        **norm(f"{name}.dt_layernorm", "recurrent.step_norm"),
        **norm(f"{name}.b_layernorm", "recurrent.key_norm"),
        **norm(f"{name}.c_layernorm", "recurrent.query_norm"),
    }


def selective_by_head(name: str) -> Names:
    """Mamba whose heads have their own projections (Zamba)."""
    return {
        **selective(name),
        **linear(f"{name}.in_proj", "recurrent.stream_gate", recurrent_takes.alternating, recurrent_takes.alternating),
        f"{name}.x_proj_weight": (Target("recurrent.parts.by_head", takes.transpose),),
        f"{name}.dt_proj_weight": (Target("recurrent.step.by_head", takes.transpose),),
        f"{name}.dt_proj_bias": (Target("recurrent.step_bias", recurrent_takes.joined_heads),),
        f"{name}.A_log": (Target("recurrent.fade", recurrent_takes.joined_heads),),
        f"{name}.D": (Target("recurrent.passed", recurrent_takes.joined_heads),),
    }


def state_space(name: str) -> Names:
    """Mamba-2."""
    parts = ("gate", "stream", "step")
    taken = [recurrent_takes.state_space_part(number) for number in range(3)]
    return {
        **_mamba(name),
        f"{name}.in_proj.weight": tuple(
            Target(f"recurrent.{part}.kernel", take) for part, take in zip(parts, taken, strict=True)
        ),
        f"{name}.in_proj.bias": tuple(
            Target(f"recurrent.{part}.bias", take) for part, take in zip(parts, taken, strict=True)
        ),
        f"{name}.dt_bias": (Target("recurrent.step_bias"),),
        **norm(f"{name}.norm", "recurrent.norm", recurrent_takes.group_norm),
    }


def gated_delta(name: str) -> Names:
    """A gated delta net: projections in two layouts of one Linear, or apart."""
    qkv = ("q", "k", "v")
    return {
        f"{name}.in_proj_qkv.weight": tuple(
            Target(f"recurrent.{part}.kernel", recurrent_takes.delta_part(i)) for i, part in enumerate(qkv)
        ),
        **linear(f"{name}.in_proj_z", "recurrent.output_gate", recurrent_takes.delta_values),
        **linear(f"{name}.in_proj_b", "recurrent.gates", slot="0"),
        **linear(f"{name}.in_proj_a", "recurrent.gates", slot="1"),
        f"{name}.in_proj_qkvz.weight": tuple(
            Target(f"recurrent.{part}.kernel", recurrent_takes.delta_part_by_head(i))
            for i, part in enumerate((*qkv, "output_gate"))
        ),
        f"{name}.in_proj_ba.weight": tuple(
            Target("recurrent.gates.kernel", recurrent_takes.delta_gate_by_head(i), f":, {i}") for i in range(2)
        ),
        f"{name}.conv1d.weight": tuple(
            Target(f"recurrent.{part}_filters", recurrent_takes.delta_filters(i)) for i, part in enumerate(qkv)
        ),
        f"{name}.A_log": (Target("recurrent.fade"),),
        f"{name}.dt_bias": (Target("recurrent.fade_bias"),),
        **norm(f"{name}.norm", "recurrent.norm"),
        **linear(f"{name}.out_proj", "recurrent.out"),
    }


def rg_lru(name: str) -> Names:
    """A real-gated linear recurrent unit with its convolution."""
    unit = f"{name}.rg_lru"
    return {
        **linear(f"{name}.linear_x", "recurrent.stream"),
        **linear(f"{name}.linear_y", "recurrent.output_gate"),
        f"{name}.conv_1d.weight": (Target("recurrent.filters", recurrent_takes.filters),),
        f"{name}.conv_1d.bias": (Target("recurrent.filter_bias"),),
        f"{unit}.input_gate_weight": (Target("recurrent.gates", slot="0"),),
        f"{unit}.input_gate_bias": (Target("recurrent.gate_bias", slot="0"),),
        f"{unit}.recurrent_gate_weight": (Target("recurrent.gates", slot="1"),),
        f"{unit}.recurrent_gate_bias": (Target("recurrent.gate_bias", slot="1"),),
        f"{unit}.recurrent_param": (Target("recurrent.fade"),),
        **linear(f"{name}.linear_out", "recurrent.out"),
    }


def lightning(name: str) -> Names:
    """Lightning attention."""
    return {
        **linear(f"{name}.qkv_proj", "recurrent.qkv", recurrent_takes.lightning_qkv),
        **linear(f"{name}.output_gate", "recurrent.output_gate", recurrent_takes.by_head(LightningType)),
        **norm(f"{name}.norm", "recurrent.norm", recurrent_takes.by_head(LightningType)),
        **linear(f"{name}.out_proj", "recurrent.out", recurrent_takes.by_head_in(LightningType)),
    }


def _convolutions(name: str) -> Names:
    """Filters of queries, keys and values that lie apart."""
    return {
        f"{name}.{part}_conv1d.weight": (Target(f"recurrent.{part}_filters", recurrent_takes.filters),)
        for part in ("q", "k", "v")
    }


def gated_delta_apart(name: str) -> Names:
    """A gated delta net, every projection and filter apart."""
    return {
        **_convolutions(name),
        **linear(f"{name}.q_proj", "recurrent.q", recurrent_takes.delta_keys),
        **linear(f"{name}.k_proj", "recurrent.k", recurrent_takes.delta_keys),
        **linear(f"{name}.v_proj", "recurrent.v", recurrent_takes.delta_values),
        **linear(f"{name}.b_proj", "recurrent.gates", slot="0"),
        **linear(f"{name}.a_proj", "recurrent.gates", slot="1"),
        **linear(f"{name}.g_proj", "recurrent.output_gate", recurrent_takes.delta_values),
        f"{name}.A_log": (Target("recurrent.fade"),),
        f"{name}.dt_bias": (Target("recurrent.fade_bias"),),
        **norm(f"{name}.o_norm", "recurrent.norm"),
        **linear(f"{name}.o_proj", "recurrent.out"),
    }


def kimi_delta(name: str) -> Names:
    """Kimi delta attention, with full projections or such of low rank for fades and gate."""
    heads = recurrent_takes.by_head(KimiDeltaType)
    return {
        **_convolutions(name),
        **linear(f"{name}.q_proj", "recurrent.q", heads),
        **linear(f"{name}.k_proj", "recurrent.k", heads),
        **linear(f"{name}.v_proj", "recurrent.v", heads),
        **linear(f"{name}.b_proj", "recurrent.rate"),
        **linear(f"{name}.f_proj", "recurrent.fades", heads),
        **linear(f"{name}.f_a_proj", "recurrent.fades_down"),
        **linear(f"{name}.f_b_proj", "recurrent.fades", heads),
        **linear(f"{name}.g_proj", "recurrent.output_gate", heads),
        **linear(f"{name}.g_a_proj", "recurrent.gate_down"),
        **linear(f"{name}.g_b_proj", "recurrent.output_gate", heads),
        f"{name}.A_log": (Target("recurrent.fade", takes.flatten),),
        f"{name}.dt_bias": (Target("recurrent.fade_bias", heads),),
        **norm(f"{name}.o_norm", "recurrent.norm"),
        **linear(f"{name}.o_proj", "recurrent.out"),
        **linear(f"{name}.dense", "recurrent.out"),
    }


def matrix_lstm(name: str) -> Names:
    """An mLSTM: projections apart, or fused in two Linears."""
    parts = ("q", "k", "v", "output_gate")
    apart = ("q", "k", "v", "ogate_preact")
    return {
        **{
            f"{name}.{source}.weight": (Target(f"recurrent.{part}.kernel", recurrent_takes.by_head(MatrixLSTMType)),)
            for source, part in zip(apart, parts, strict=True)
        },
        f"{name}.qkv_opreact.weight": tuple(
            Target(f"recurrent.{part}.kernel", recurrent_takes.lstm_part(i)) for i, part in enumerate(parts)
        ),
        **linear(f"{name}.igate_preact", "recurrent.gates", slot="0"),
        **linear(f"{name}.fgate_preact", "recurrent.gates", slot="1"),
        **linear(f"{name}.ifgate_preact", "recurrent.gates", takes.halves, takes.halves),
        **norm(f"{name}.multihead_norm", "recurrent.norm", recurrent_takes.by_head(MatrixLSTMType)),
        **linear(f"{name}.out_proj", "recurrent.out", recurrent_takes.by_head_in(MatrixLSTMType)),
    }


GATED_ATTENTION: Names = {
    f"self_attn.q_proj.{kind}": tuple(
        Target(f"attention.{path}", recurrent_takes.gated_queries(i)) for i, path in enumerate(paths)
    )
    for kind, paths in (("weight", ("q.kernel", "gate.kernel")), ("bias", ("q.bias", "gate_bias")))
}
"""Queries that have their gate beside them, head by head."""
