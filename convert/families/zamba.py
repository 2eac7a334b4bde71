"""Zamba: Mamba layers, some of which a transformer block guides that all of them share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from convert.families.base import (
    BlockAdapters,
    Family,
    SharedBlocks,
    decoder,
    layers_without_rope,
    require,
    rotary_layers,
)
from convert.families.numbers import count, positive
from convert.families.recurrent import mamba_of, mixed, state_space_of
from convert.weights import takes
from convert.weights.parts import Names, attention, in_module, layer_rules, linear, mlp, norm, outer_rules
from convert.weights.recurrent_parts import selective_by_head, state_space
from convert.weights.rules import Rule
from tide_jax.model.architecture import AttentionType, DecoderConfig
from tide_jax.model.recurrent.types import RecurrentType


def _guided(hf: Any, kind: RecurrentType, layers: Sequence[AttentionType], **flags: Any) -> DecoderConfig:
    """A decoder of recurrent layers; in "hybrid" ones, attention and a feed-forward block guide them."""
    return decoder(
        hf,
        mixed(hf, {"linear_attention": kind, "hybrid": layers[0]}),
        recurrent_types=(kind,),
        beside_attention=0,
        mlp_layers=(),
        carried="embedding",
        **flags,
    )


def _scale(hf: Any) -> float:
    """Factor of query-key products: heads cover the stream and the embedding, and count as half as wide."""
    return (count(hf, "attention_head_dim") / 2) ** -0.5


def _zamba(hf: Any) -> DecoderConfig:
    require(hf, hidden_mamba_act="silu", attention_hidden_size=2 * hf.hidden_size)
    kind = mamba_of(hf, heads=count(hf, "n_mamba_heads"))
    return _guided(hf, kind, layers_without_rope(hf, _scale(hf)), positions="none")


def _zamba2(hf: Any) -> DecoderConfig:
    count(hf, "adapter_rank")
    kind = state_space_of(
        hf,
        heads="n_mamba_heads",
        head_dim="mamba_headdim",
        groups="mamba_ngroups",
        state_size="mamba_d_state",
        width="mamba_d_conv",
        bias=bool(hf.add_bias_linear),
        step_limit=(positive(hf, "time_step_min"), 1e30),
    )
    flags = {"mlp_bias": bool(hf.add_bias_linear)}
    if hf.use_mem_rope:
        return _guided(hf, kind, rotary_layers(hf, scale=_scale(hf)), **flags)
    return _guided(hf, kind, layers_without_rope(hf, _scale(hf)), positions="none", **flags)


def _guide(block: str, *feed_forward: Names) -> Names:
    """Names of the shared block, and of the projection behind it."""
    parts = [
        in_module("guide.attention", attention(f"{block}.self_attn", out="o_proj")),
        *(in_module("guide.mlp", names) for names in feed_forward),
        norm(f"{block}.input_layernorm", "guide.norm"),
        norm(f"{block}.pre_ff_layernorm", "guide.mlp_norm"),
        linear("linear", "guide.out"),
    ]
    return {name: targets for part in parts for name, targets in part.items()}


def _rules(*names: Names) -> tuple[Rule, ...]:
    norms = [norm(f"{inside}input_layernorm", "pre_attention_norm") for inside in ("", "mamba_decoder.")]
    outer = outer_rules("[model.]embed_tokens", "[model.]final_layernorm")
    return (*outer, *layer_rules("[model.]layers", *norms, *names))


_ATTENTION_ADAPTERS = "use_shared_attention_adapter"
_BLOCK, _BLOCK2 = "shared_transf", "shared_transformer"
_GATE_UP = linear(f"{_BLOCK2}.feed_forward.gate_up_proj", "mlp.gate_up", takes.halves, takes.halves)
_DOWN = linear(f"{_BLOCK2}.feed_forward.down_proj", "mlp.down")
ZAMBA = _rules(
    selective_by_head("mamba"),
    selective_by_head("mamba_decoder.mamba"),
    _guide(_BLOCK, mlp(f"{_BLOCK}.feed_forward", "mlp")),
)
ZAMBA2 = _rules(state_space("mamba"), state_space("mamba_decoder.mamba"), _guide(_BLOCK2, _GATE_UP, _DOWN))
FAMILIES: dict[str, Family] = {
    "zamba": Family(_zamba, ZAMBA, shared_blocks=SharedBlocks(_BLOCK, "linear.weight")),
    "zamba2": Family(
        _zamba2,
        ZAMBA2,
        shared_blocks=SharedBlocks(
            _BLOCK2,
            "linear.weight",
            count="num_mem_blocks",
            adapters=(
                BlockAdapters("feed_forward.gate_up_proj", "feed_forward.gate_up_proj_adapter_list"),
                *(
                    BlockAdapters(f"self_attn.{p}_proj", f"self_attn.linear_{p}_adapter_list", _ATTENTION_ADAPTERS)
                    for p in "qkv"
                ),
            ),
        ),
    ),
}
