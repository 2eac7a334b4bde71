"""Settings of recurrent layers that make no sense: one clear line with the setting's name, never Python's words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file
from test_settings import read, settings
from tiny_llama import refusal

from convert.families import FAMILIES
from convert.parity.tiny import save_tiny
from convert.parity.tiny_recurrent import RECURRENT_VARIANTS
from tide_jax.errors import TideError
from tide_jax.functional import Decoder, DecoderConfig

TYPES = sorted({model_type for model_type, _ in RECURRENT_VARIANTS.values()} | {"falcon_mamba", "qwen3_5_moe_text"})
GRANITE = RECURRENT_VARIANTS["granitemoehybrid-recurrent"][1]
PYTHONS_WORDS = ("do not fit together", "by zero", "not supported between", "NothingType")
NAMED = """
conv_L_cache conv_kernel conv1d_width mamba_d_conv linear_conv_kernel_dim
state_size ssm_state_size mamba_d_state time_step_rank mamba_dt_rank
num_heads n_groups mamba_n_heads mamba_n_groups mamba_num_heads mamba_head_dim mamba_d_head
linear_num_key_heads linear_num_value_heads linear_key_head_dim linear_value_head_dim linear_num_heads linear_head_dim
n_mamba_heads mamba_ngroups lru_width attention_hidden_size block_multiple_of ffn_round_up_to_multiple_of
"""
"""Sizes of recurrent layers and of the blocks beside them."""
UNREAD = {
    "mamba2": {"time_step_rank"},
    "zamba": {"attention_hidden_size"},
    "zamba2": {"attention_hidden_size"},
}
"""Those of them that a model never reads, although its class declares them, or whose 0 stands for a default."""


def of(model_type: str, **changes: Any) -> dict[str, Any]:
    """The config.json of a tiny model with recurrent layers, with changes."""
    return settings(model_type) | (GRANITE if model_type == "granitemoehybrid" else {}) | changes


def numbers(config: dict[str, Any]) -> list[str]:
    return [name for name, value in config.items() if isinstance(value, int | float) and not isinstance(value, bool)]


def said_of(config: dict[str, Any]) -> tuple[str, DecoderConfig | None]:
    """The line that refuses a config.json, or what is read from it."""
    try:
        return "", read(config)
    except TideError as error:
        return str(error), None


def test_every_type_with_recurrent_layers_is_swept() -> None:
    recurrent = {name for name in FAMILIES if not name.endswith("_vl_text") and read(settings(name)).recurrent_types}
    assert recurrent <= set(TYPES)


@pytest.mark.matrix(keep=21)
@pytest.mark.parametrize("value", [0, -1, "wide"])
@pytest.mark.parametrize("model_type", TYPES)
def test_a_number_that_makes_no_sense_is_refused_or_leaves_a_model_that_can_be_made(
    model_type: str, value: Any
) -> None:
    config = of(model_type)
    usual = read(config)
    for name in numbers(config):
        said, found = said_of(config | {name: value})
        assert "\n" not in said
        assert (found is None) == bool(said)
        if found not in (None, usual):
            nnx.eval_shape(lambda config=found: Decoder(config, rngs=nnx.Rngs(0)))


@pytest.mark.parametrize("value", [0, -1, "wide"])
@pytest.mark.parametrize("model_type", sorted(set(TYPES) - {"minimax"}))  # it has the heads of its attention
def test_a_size_that_makes_no_sense_is_named(model_type: str, value: Any) -> None:
    config = of(model_type)
    names = set(numbers(config)) & set(NAMED.split()) - UNREAD.get(model_type, set())
    if value == "wide":
        names -= {"mamba_d_head"}  # transformers' class takes words, and names the sizes that do not fit
    assert names
    for name in names:
        said, _ = said_of(config | {name: value})
        assert name in said
        assert not any(words in said for words in PYTHONS_WORDS)


@pytest.mark.parametrize(
    ("model_type", "changes", "expected"),
    [
        ("recurrent_gemma", {"lru_width": 50}, "lru_width=50 is not a multiple of num_attention_heads=6"),
        ("xlstm", {"num_heads": 5}, "hidden_size * qk_dim_factor=64 is not a multiple of num_heads=5"),
        ("xlstm", {"v_dim_factor": 0.9}, "hidden_size * v_dim_factor=115 is not a multiple of num_heads=4"),
        ("mamba2", {"n_groups": 3}, "num_heads=8 is not a multiple of n_groups=3"),
        ("bamba", {"mamba_n_groups": 3}, "mamba_n_heads=8 is not a multiple of mamba_n_groups=3"),
        ("nemotron_h", {"n_groups": 3}, "mamba_num_heads=8 is not a multiple of n_groups=3"),
        ("qwen3_next", {"linear_num_key_heads": 3}, "linear_num_value_heads=4 is not a multiple of linear_num_key_"),
    ],
)
def test_heads_that_do_not_divide(model_type: str, changes: dict[str, Any], expected: str) -> None:
    assert expected in said_of(of(model_type, **changes))[0]


TWO = "expected 2 numbers, none below 0; correct config.json"


@pytest.mark.parametrize(
    ("model_type", "changes", "expected"),
    [
        ("mamba2", {"time_step_limit": [0.1]}, f"time_step_limit=[0.1] makes no sense, {TWO}"),
        (
            "bamba",
            {"time_step_limit": [0.1]},
            "config.json is not valid for bamba: Validation error for field 'time_step_limit'",
        ),
        ("mamba2", {"time_step_limit": [0.1, 0.2, 0.3]}, f"time_step_limit=[0.1, 0.2, 0.3] makes no sense, {TWO}"),
        ("granitemoehybrid", {"time_step_limit": [-0.1, 0.2]}, f"time_step_limit=(-0.1, 0.2) makes no sense, {TWO}"),
        (
            "mamba2",
            {"time_step_limit": [2.0, 1.0]},
            "step_limit=(2.0, 1.0) must be the least and the largest time step",
        ),
        ("falcon_h1", {"mlp_multipliers": [1.0]}, "mlp_multipliers=[1.0] makes no sense, expected 2 numbers above 0"),
        ("falcon_h1", {"ssm_multipliers": [1.0] * 4}, "makes no sense, expected 5 numbers above 0"),
        ("falcon_h1", {"ssm_multipliers": [1.0] * 4 + [0.0]}, "makes no sense, expected 5 numbers above 0"),
        ("falcon_h1", {"key_multiplier": 0.0}, "key_multiplier=0.0 makes no sense, expected a number above 0"),
        ("minimax", {"mlp_beta_factor": -1.0}, "mlp_beta_factor=-1.0 makes no sense, expected a number above 0"),
        ("xlstm", {"gate_soft_cap": 0.0}, "gate_soft_cap=0.0 makes no sense, expected a number above 0"),
        ("lfm2", {"block_ffn_dim_multiplier": 0.0}, "block_ffn_dim_multiplier=0.0 makes no sense"),
        ("qwen3_next", {"decoder_sparse_step": 0}, "decoder_sparse_step=0 makes no sense, expected a whole number"),
        ("xlstm", {"eps": -1.0}, "MatrixLSTMType.eps=-1.0 should be at least 0"),
        (
            "mamba2",
            {"state_size": 2**40},
            "recurrent_types.0.StateSpaceType.state_size=1099511627776 should be at most 1",
        ),
    ],
)
def test_factors_and_limits_that_make_no_sense(model_type: str, changes: dict[str, Any], expected: str) -> None:
    assert expected in said_of(of(model_type, **changes))[0]


@pytest.mark.matrix(keep=4)
@pytest.mark.parametrize(
    ("model_type", "missing", "expected"),
    [
        ("mamba", "mixer.A_log", "recurrent.fade "),
        ("mamba2", "mixer.conv1d.weight", "recurrent.filters "),
        ("jamba", "mamba.D", "recurrent.passed "),
        ("qwen3_next", "linear_attn.dt_bias", "recurrent.fade_bias "),
        ("lfm2", "conv.conv.weight", "recurrent.filters "),
        ("recurrent_gemma", "temporal_block.rg_lru.recurrent_param", "recurrent.fade "),
        ("kimi_linear", "self_attn.A_log", "recurrent.fade "),
        ("rwkv", "attention.time_decay", "recurrent.fade "),
    ],
)
def test_a_missing_parameter_of_the_state_is_named(
    model_type: str, missing: str, expected: str, tmp_path: Path
) -> None:
    pytest.importorskip("torch")
    save_tiny(model_type, tmp_path / "source")
    file = tmp_path / "source" / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith(missing))
    save_file({other: tensor for other, tensor in tensors.items() if other != name}, file, {"format": "pt"})
    said = refusal(tmp_path / "source")
    assert "1 problem: parameter layers." in said
    assert expected in said
    assert "has no source tensor" in said
