"""Recurrent layers give what transformers' layers give: whole rows, padded batches, and token by token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tide_jax.model.recurrent.gated_delta import GatedDelta
from tide_jax.model.recurrent.kimi_delta import KimiDelta
from tide_jax.model.recurrent.lightning import Lightning
from tide_jax.model.recurrent.matrix_lstm import MatrixLSTM
from tide_jax.model.recurrent.mixer import Mixer
from tide_jax.model.recurrent.order import TokenOrder
from tide_jax.model.recurrent.rg_lru import RgLru
from tide_jax.model.recurrent.selective import Selective
from tide_jax.model.recurrent.short_conv import ShortConv
from tide_jax.model.recurrent.state_space import StateSpace
from tide_jax.model.recurrent.time_mix import TimeMix
from tide_jax.model.recurrent.types import (
    GatedDeltaType,
    KimiDeltaType,
    LightningType,
    MatrixLSTMType,
    RgLruType,
    SelectiveType,
    ShortConvType,
    StateSpaceType,
    TimeMixType,
)

torch = pytest.importorskip("torch")
SIZE, TOKENS = 24, 75
Pair = tuple[Mixer, Callable[[np.ndarray], np.ndarray]]


def random_weights(module: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in module.parameters():
            weight.copy_(0.4 * torch.randn(weight.shape, generator=generator))


def set_weights(mixer: Mixer, **weights: Any) -> Mixer:
    """Sets parameters by dotted path; kernels as transformers stores them, outputs before inputs."""
    state = nnx.state(mixer)
    flat = {".".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(state)}
    given = {path.replace("__", "."): np.asarray(value.detach()) for path, value in weights.items()}
    assert set(flat) == set(given)
    for path, leaf in flat.items():
        leaf.set_value(jnp.asarray(given[path].reshape(leaf.get_value().shape)))
    nnx.update(mixer, state)
    return mixer


def reference(module: Any) -> Callable[[np.ndarray], np.ndarray]:
    def run(x: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return module(torch.tensor(x)).numpy()

    return run


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


MAKERS = [
    short_conv,
    gated_delta,
    rates_up_to_two,
    kimi_delta,
    full_kimi_delta,
    limited_kimi_delta,
    state_space,
    selective,
    plain_norms,
    scaled_norms,
    lightning,
    rg_lru,
    matrix_lstm,
    time_mix,
]


@pytest.fixture(scope="module", params=MAKERS, ids=lambda make: make.__name__)
def pair(request: pytest.FixtureRequest) -> Pair:
    return request.param()


def rows() -> np.ndarray:
    return np.random.default_rng(3).normal(size=(2, TOKENS, SIZE)).astype(np.float32)


def assert_close(found: Any, wanted: np.ndarray) -> None:
    """No number differs by more than a few roundings of the largest one."""
    np.testing.assert_allclose(found, wanted, rtol=0, atol=4e-6 * np.abs(wanted).max())


@jax.jit
def run(mixer: Mixer, x: jax.Array, real: jax.Array, state: Any) -> tuple[jax.Array, Any]:
    order = TokenOrder.of(real)
    out, inputs = mixer(x, order, state)
    return out, mixer.advance(state, inputs, order)


def test_whole_rows(pair: Pair) -> None:
    mixer, expected = pair
    x = rows()
    out, _ = run(mixer, jnp.asarray(x), jnp.ones(x.shape[:2], bool), mixer.start(2, jnp.float32))
    assert_close(out, expected(x))


def test_padding_anywhere_and_rows_in_parts(pair: Pair) -> None:
    """Tokens of each row, with slots that hold none before, between and behind them, in three passes."""
    mixer, expected = pair
    x, real = rows(), np.random.default_rng(4).random((2, TOKENS)) < 0.7
    real[1, :9] = False
    state, outs = mixer.start(2, jnp.float32), []
    for part in (slice(0, 40), slice(40, 41), slice(41, TOKENS)):
        spoilt = np.where(real[:, part, None], x[:, part], 1e3)
        out, state = run(mixer, jnp.asarray(spoilt), jnp.asarray(real[:, part]), state)
        outs.append(np.asarray(out))
    out = np.concatenate(outs, axis=1)
    for b in range(2):
        assert_close(out[b, real[b]], expected(x[b : b + 1, real[b]])[0])


def test_token_by_token(pair: Pair) -> None:
    mixer, expected = pair
    x, state, outs = rows()[:, :12], mixer.start(2, jnp.float32), []
    for t in range(x.shape[1]):
        out, state = run(mixer, jnp.asarray(x[:, t : t + 1]), jnp.ones((2, 1), bool), state)
        outs.append(out)
    assert_close(np.concatenate(outs, axis=1), expected(x))


def test_inputs_without_running_the_layer(pair: Pair) -> None:
    mixer, _ = pair
    x = jnp.asarray(rows())
    _, inputs = mixer(x, TokenOrder.of(jnp.ones(x.shape[:2], bool)), mixer.start(2, jnp.float32))
    np.testing.assert_array_equal(mixer.project_inputs(x), inputs)
