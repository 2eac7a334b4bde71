"""Pairs of layers whose channels remember each by itself: convolutions, Mamba, RG-LRU, RWKV; see `mixer_pairs`."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from flax import nnx
from mixer_pairs import SIZE, Pair, random_weights, reference, set_weights, torch

from tide_jax.model.recurrent.rg_lru import RgLru
from tide_jax.model.recurrent.selective import Selective
from tide_jax.model.recurrent.short_conv import ShortConv
from tide_jax.model.recurrent.time_mix import TimeMix
from tide_jax.model.recurrent.types import RgLruType, SelectiveType, ShortConvType, TimeMixType


def short_conv() -> Pair:
    from transformers import Lfm2Config
    from transformers.models.lfm2.modeling_lfm2 import Lfm2ShortConv

    config = Lfm2Config(hidden_size=SIZE, conv_L_cache=3, conv_bias=True, layer_types=["conv"], num_hidden_layers=1)
    module = Lfm2ShortConv(config, 0)
    random_weights(module)
    mixer = ShortConv(SIZE, ShortConvType(width=3, bias=True), dtype=jnp.float32, rngs=nnx.Rngs(0))
    return set_weights(
        mixer,
        inputs__kernel=module.in_proj.weight,
        inputs__bias=module.in_proj.bias,
        filters=module.conv.weight,
        filter_bias=module.conv.bias,
        out__kernel=module.out_proj.weight,
        out__bias=module.out_proj.bias,
    ), reference(module)


def selective(norms: str = "none") -> Pair:
    from transformers import FalconMambaConfig, JambaConfig, MambaConfig
    from transformers.models.falcon_mamba.modeling_falcon_mamba import FalconMambaMixer
    from transformers.models.jamba.modeling_jamba import JambaMambaMixer
    from transformers.models.mamba.modeling_mamba import MambaMixer

    sizes = {"hidden_size": SIZE, "num_hidden_layers": 1}
    if norms == "scaled":
        mamba = {"mamba_d_state": 5, "mamba_d_conv": 4, "mamba_expand": 2, "mamba_dt_rank": 3}
        config = JambaConfig(**sizes, **mamba, mamba_proj_bias=True, use_mamba_kernels=False)
        module, eps = JambaMambaMixer(config, 0), config.rms_norm_eps
    else:
        mamba = {"state_size": 5, "conv_kernel": 4, "expand": 2, "time_step_rank": 3, "use_bias": True}
        config = (MambaConfig if norms == "none" else FalconMambaConfig)(**sizes, **mamba)
        module = (MambaMixer if norms == "none" else FalconMambaMixer)(config, 0, initialize_mixer_weights=False)
        eps = getattr(config, "mixer_rms_eps", 1e-6)
    random_weights(module)
    kind = SelectiveType(inner=48, state_size=5, step_rank=3, width=4, bias=True, norms=norms, norm_eps=eps)
    mixer = Selective(SIZE, kind, dtype=jnp.float32, rngs=nnx.Rngs(0))
    scales = {
        f"{ours}_norm__scale": getattr(module, f"{theirs}_layernorm").weight
        for ours, theirs in (("step", "dt"), ("key", "b"), ("query", "c"))
        if norms == "scaled"
    }
    return set_weights(
        mixer,
        **scales,
        stream_gate__kernel=module.in_proj.weight,
        stream_gate__bias=module.in_proj.bias,
        parts__kernel=module.x_proj.weight,
        step__kernel=module.dt_proj.weight,
        step_bias=module.dt_proj.bias,
        filters=module.conv1d.weight,
        filter_bias=module.conv1d.bias,
        fade=module.A_log,
        passed=module.D,
        out__kernel=module.out_proj.weight,
        out__bias=module.out_proj.bias,
    ), reference(module)


def plain_norms() -> Pair:
    return selective("plain")


def scaled_norms() -> Pair:
    return selective("scaled")


def rg_lru() -> Pair:
    from transformers import RecurrentGemmaConfig
    from transformers.models.recurrent_gemma.modeling_recurrent_gemma import RecurrentGemmaRecurrentBlock

    config = RecurrentGemmaConfig(hidden_size=SIZE, num_attention_heads=3, lru_width=30, num_hidden_layers=1)
    module = RecurrentGemmaRecurrentBlock(config, 0)
    random_weights(module)
    kind = RgLruType(blocks=3, block_dim=10, width=4)
    mixer = RgLru(SIZE, kind, dtype=jnp.float32, rngs=nnx.Rngs(0))

    def expected(x: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            positions = torch.arange(x.shape[1])[None]
            return module(torch.tensor(x), positions, None, use_cache=False)[0].numpy()

    unit = module.rg_lru
    return set_weights(
        mixer,
        stream__kernel=module.linear_x.weight,
        stream__bias=module.linear_x.bias,
        output_gate__kernel=module.linear_y.weight,
        output_gate__bias=module.linear_y.bias,
        filters=module.conv_1d.weight,
        filter_bias=module.conv_1d.bias,
        gates=torch.stack([unit.input_gate_weight, unit.recurrent_gate_weight]),
        gate_bias=torch.stack([unit.input_gate_bias, unit.recurrent_gate_bias]),
        fade=unit.recurrent_param,
        out__kernel=module.linear_out.weight,
        out__bias=module.linear_out.bias,
    ), expected


def time_mix() -> Pair:
    from transformers import RwkvConfig
    from transformers.models.rwkv.modeling_rwkv import RwkvSelfAttention

    module = RwkvSelfAttention(RwkvConfig(hidden_size=SIZE, attention_hidden_size=30, num_hidden_layers=2))
    random_weights(module)
    mixer = TimeMix(SIZE, TimeMixType(inner=30), dtype=jnp.float32, rngs=nnx.Rngs(0))
    shares = module.time_mix_key, module.time_mix_value, module.time_mix_receptance

    def run(x: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return module(torch.tensor(x))[0].numpy()

    return set_weights(
        mixer,
        shares=torch.cat(shares),
        k__kernel=module.key.weight,
        v__kernel=module.value.weight,
        gate__kernel=module.receptance.weight,
        fade=module.time_decay,
        bonus=module.time_first,
        out__kernel=module.output.weight,
    ), run
