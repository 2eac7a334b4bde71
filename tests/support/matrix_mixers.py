"""Pairs of layers whose heads have a matrix each: delta nets, Mamba-2, lightning, mLSTM; see `mixer_pairs`."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from mixer_pairs import SIZE, Pair, random_weights, reference, set_weights, torch

from tide_jax.model.recurrent.gated_delta import GatedDelta
from tide_jax.model.recurrent.kimi_delta import KimiDelta
from tide_jax.model.recurrent.lightning import Lightning
from tide_jax.model.recurrent.matrix_lstm import MatrixLSTM
from tide_jax.model.recurrent.mixer import Mixer
from tide_jax.model.recurrent.state_space import StateSpace
from tide_jax.model.recurrent.types import GatedDeltaType, KimiDeltaType, LightningType, MatrixLSTMType, StateSpaceType


def delta_filters(module: Any, *channels: int) -> dict[str, Any]:
    """Filters of queries, keys and values."""
    parts = torch.split(module.conv1d.weight, channels)
    return {f"{name}_filters": part for name, part in zip("qkv", parts, strict=True)}


def gated_delta() -> Pair:
    from transformers import Qwen3NextConfig
    from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

    config = Qwen3NextConfig(
        hidden_size=SIZE, linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8,
        linear_value_head_dim=6, linear_conv_kernel_dim=4, layer_types=["linear_attention"], num_hidden_layers=1,
    )  # fmt: skip
    module = Qwen3NextGatedDeltaNet(config, 0)
    random_weights(module)
    kind = GatedDeltaType(key_heads=2, value_heads=4, key_dim=8, value_dim=6, width=4)
    mixer = GatedDelta(SIZE, kind, dtype=jnp.float32, rngs=nnx.Rngs(0))
    # transformers stores the rows of each key head together: its query, key, values and gates.
    parts = torch.split(module.in_proj_qkvz.weight.view(2, -1, SIZE), [8, 8, 12, 12], dim=1)
    q, k, v, z = (part.reshape(-1, SIZE) for part in parts)
    rate, fade = (a.reshape(-1, SIZE) for a in torch.split(module.in_proj_ba.weight.view(2, -1, SIZE), [2, 2], dim=1))
    return set_weights(
        mixer,
        q__kernel=q,
        k__kernel=k,
        v__kernel=v,
        gates__kernel=torch.stack([rate, fade]),
        output_gate__kernel=z,
        **delta_filters(module, 16, 16, 24),
        fade=module.A_log,
        fade_bias=module.dt_bias,
        norm__scale=module.norm.weight,
        out__kernel=module.out_proj.weight,
    ), reference(module)


def rates_up_to_two() -> Pair:
    from transformers import OlmoHybridConfig
    from transformers.models.olmo_hybrid.modeling_olmo_hybrid import OlmoHybridGatedDeltaNet

    config = OlmoHybridConfig(
        hidden_size=SIZE, num_attention_heads=4, linear_num_key_heads=2, linear_num_value_heads=4,
        linear_key_head_dim=8, linear_value_head_dim=6, layer_types=["linear_attention", "full_attention"],
        num_hidden_layers=2, linear_allow_neg_eigval=True,
    )  # fmt: skip
    module = OlmoHybridGatedDeltaNet(config, 0)
    random_weights(module)
    kind = GatedDeltaType(
        key_heads=2, value_heads=4, key_dim=8, value_dim=6, width=4, largest_rate=2.0, norm_eps=1e-5
    )  # fmt: skip
    mixer = GatedDelta(SIZE, kind, dtype=jnp.float32, rngs=nnx.Rngs(0))
    return set_weights(
        mixer,
        q__kernel=module.q_proj.weight,
        k__kernel=module.k_proj.weight,
        v__kernel=module.v_proj.weight,
        gates__kernel=torch.stack([module.b_proj.weight, module.a_proj.weight]),
        output_gate__kernel=module.g_proj.weight,
        **delta_filters(module, 16, 16, 24),
        fade=module.A_log,
        fade_bias=module.dt_bias,
        norm__scale=module.o_norm.weight,
        out__kernel=module.o_proj.weight,
    ), reference(module)


def kimi_weights(mixer: Mixer, module: Any, **more: Any) -> Pair:
    return set_weights(
        mixer,
        q__kernel=module.q_proj.weight,
        k__kernel=module.k_proj.weight,
        v__kernel=module.v_proj.weight,
        rate__kernel=module.b_proj.weight,
        **delta_filters(module, 24, 24, 24),
        fade=module.forget_gate.A_log,
        fade_bias=module.forget_gate.dt_bias,
        norm__scale=module.o_norm.weight,
        out__kernel=module.o_proj.weight,
        **more,
    ), reference(module)


def kimi_delta() -> Pair:
    from transformers import KimiLinearConfig
    from transformers.models.kimi_linear.modeling_kimi_linear import KimiLinearDeltaAttention

    config = KimiLinearConfig(hidden_size=SIZE, linear_num_heads=3, linear_head_dim=8, num_hidden_layers=1)
    module = KimiLinearDeltaAttention(config, 0)
    random_weights(module)
    kind = KimiDeltaType(heads=3, head_dim=8, width=4, fade_rank=8, gate_rank=8, norm_eps=config.rms_norm_eps)
    return kimi_weights(
        KimiDelta(SIZE, kind, dtype=jnp.float32, rngs=nnx.Rngs(0)),
        module,
        fades_down__kernel=module.forget_gate.f_a_proj.weight,
        fades__kernel=module.forget_gate.f_b_proj.weight,
        gate_down__kernel=module.g_a_proj.weight,
        output_gate__kernel=module.g_b_proj.weight,
    )


def full_kimi_delta(limit: float | None = None) -> Pair:
    from transformers import BailingHybridConfig
    from transformers.models.bailing_hybrid.modeling_bailing_hybrid import BailingHybridDeltaAttention

    config = BailingHybridConfig(
        hidden_size=SIZE, num_attention_heads=3, head_dim=8, num_hidden_layers=1, kda_safe_gate=limit is not None,
        kda_lower_bound=-(limit or 5.0),
    )  # fmt: skip
    module = BailingHybridDeltaAttention(config, 0)
    random_weights(module)
    kind = KimiDeltaType(heads=3, head_dim=8, width=4, fade_limit=limit, norm_eps=config.rms_norm_eps)
    return kimi_weights(
        KimiDelta(SIZE, kind, dtype=jnp.float32, rngs=nnx.Rngs(0)),
        module,
        fades__kernel=module.forget_gate.f_proj.weight,
        output_gate__kernel=module.g_proj.weight,
    )


def limited_kimi_delta() -> Pair:
    return full_kimi_delta(3.0)


def state_space() -> Pair:
    from transformers import Mamba2Config
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    config = Mamba2Config(
        hidden_size=SIZE, num_heads=6, head_dim=8, n_groups=2, state_size=5, conv_kernel=4, expand=2, use_bias=True,
        chunk_size=16, num_hidden_layers=1, time_step_limit=(0.01, 2.0),
    )  # fmt: skip
    module = Mamba2Mixer(config, 0)
    random_weights(module)
    kind = StateSpaceType(heads=6, head_dim=8, groups=2, state_size=5, width=4, bias=True, step_limit=(0.01, 2.0),
        norm_eps=config.layer_norm_epsilon,
    )  # fmt: skip
    mixer = StateSpace(SIZE, kind, dtype=jnp.float32, rngs=nnx.Rngs(0))
    sizes = [48, 48 + 2 * 10, 6]
    gate, stream, step = torch.split(module.in_proj.weight, sizes)
    gate_bias, stream_bias, step_bias = torch.split(module.in_proj.bias, sizes)
    return set_weights(
        mixer,
        gate__kernel=gate,
        gate__bias=gate_bias,
        stream__kernel=stream,
        stream__bias=stream_bias,
        step__kernel=step,
        step__bias=step_bias,
        filters=module.conv1d.weight,
        filter_bias=module.conv1d.bias,
        fade=module.A_log,
        step_bias=module.dt_bias,
        passed=module.D,
        norm__scale=module.norm.weight,
        out__kernel=module.out_proj.weight,
        out__bias=module.out_proj.bias,
    ), reference(module)


def lightning() -> Pair:
    from transformers import MiniMaxConfig
    from transformers.models.minimax.modeling_minimax import MiniMaxLightningAttention

    config = MiniMaxConfig(
        hidden_size=SIZE, num_attention_heads=3, head_dim=10, num_hidden_layers=4, layer_types=["linear_attention"] * 4,
        block_size=16,
    )  # fmt: skip
    module = MiniMaxLightningAttention(config, 1)
    random_weights(module)
    kind = LightningType(heads=3, head_dim=10, fade=1 - 1 / (3 + 1e-5) + 1e-5)
    mixer = Lightning(SIZE, kind, dtype=jnp.float32, rngs=nnx.Rngs(0))

    def expected(x: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return module(torch.tensor(x), None, None)[0].numpy()

    return set_weights(
        mixer,
        qkv__kernel=module.qkv_proj.weight,
        output_gate__kernel=module.output_gate.weight,
        norm__scale=module.norm.weight,
        out__kernel=module.out_proj.weight,
    ), expected


def matrix_lstm() -> Pair:
    from transformers import xLSTMConfig
    from transformers.models.xlstm.modeling_xlstm import xLSTMLayer

    size = {"hidden_size": SIZE, "num_hidden_layers": 1, "num_heads": 4, "qk_dim_factor": 0.5, "v_dim_factor": 1.0}
    module = xLSTMLayer(xLSTMConfig(**size, autocast_kernel_dtype="float32", gate_soft_cap=6.0))
    random_weights(module)
    kind = MatrixLSTMType(heads=4, key_dim=3, value_dim=6, gate_softcap=6.0)
    mixer = MatrixLSTM(SIZE, kind, dtype=jnp.float32, rngs=nnx.Rngs(0))
    gates = module.igate_preact, module.fgate_preact

    def run(x: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return module(torch.tensor(x))[0].numpy()

    return set_weights(
        mixer,
        q__kernel=module.q.weight,
        k__kernel=module.k.weight,
        v__kernel=module.v.weight,
        gates__kernel=torch.stack([gate.weight for gate in gates]),
        gates__bias=torch.stack([gate.bias for gate in gates]),
        output_gate__kernel=module.ogate_preact.weight,
        norm__scale=module.multihead_norm.weight,
        out__kernel=module.out_proj.weight,
    ), run
