"""Weight maps of the supported families, as tables of rules.

Target arrays are views: torch's Linear weights are [out, in], ours are [in..., out...] with heads on axes of their own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np

from convert.rules import Rule, Target, ignore, move
from tide_jax.config import DecoderConfig


def _transposed(a: np.ndarray, c: DecoderConfig) -> np.ndarray:
    return a.T


def _heads_out(a: np.ndarray, c: DecoderConfig) -> np.ndarray:
    """[heads * hd, D] to [D, heads, hd]."""
    return a.T.reshape(a.shape[1], -1, c.head_dim)


def _heads_in(a: np.ndarray, c: DecoderConfig) -> np.ndarray:
    """[D, heads * hd] to [heads, hd, D]."""
    return a.T.reshape(-1, c.head_dim, a.shape[0])


def _heads_bias(a: np.ndarray, c: DecoderConfig) -> np.ndarray:
    return a.reshape(-1, c.head_dim)


def _conv1d_out(a: np.ndarray, c: DecoderConfig) -> np.ndarray:
    """GPT-2's Conv1D is [in, out]: [H * hd, D] to [H, hd, D]."""
    return a.reshape(-1, c.head_dim, a.shape[1])


def _blocks(pick: slice | int) -> Callable[[np.ndarray, DecoderConfig], np.ndarray]:
    """Fused [..., (q, k, v) * H * hd], a block of heads for each: [..., H, hd] or [..., H, 2, hd]."""

    def take(a: np.ndarray, c: DecoderConfig) -> np.ndarray:
        split = a.reshape(*a.shape[:-1], 3, c.num_heads, c.head_dim)
        picked = split[..., pick, :, :]
        return picked if isinstance(pick, int) else picked.swapaxes(-3, -2)

    return take


def _interleaved(pick: slice | int) -> Callable[[np.ndarray, DecoderConfig], np.ndarray]:
    """Fused [H * (q, k, v) * hd, ...], the three of a head together: [..., H, hd] or [..., H, 2, hd]."""

    def take(a: np.ndarray, c: DecoderConfig) -> np.ndarray:
        return a.T.reshape(*a.T.shape[:-1], c.num_heads, 3, c.head_dim)[..., pick, :]

    return take


_Q, _KV = 0, slice(1, 3)


def _untied(config: DecoderConfig) -> bool:
    return not config.tie_embeddings


def _tied(config: DecoderConfig) -> bool:
    return config.tie_embeddings


def _head(name: str) -> tuple[Rule, ...]:
    return (
        move(name, Target("head.kernel"), when=_untied),
        ignore(move(name).pattern, "tied to the token embedding", when=_tied),
    )


def _layers(prefix: str, names: Mapping[str, tuple[Target, ...]]) -> tuple[Rule, ...]:
    """Rules of a layer's tensors; target paths are relative to the layer."""
    return tuple(
        move(
            f"{prefix}.{{layer}}.{name}",
            *(dataclasses.replace(target, path=f"layers.{{layer}}.{target.path}") for target in targets),
        )
        for name, targets in names.items()
    )


def _norm(name: str, path: str) -> dict[str, tuple[Target, ...]]:
    return {f"{name}.weight": (Target(f"{path}.scale"),), f"{name}.bias": (Target(f"{path}.bias"),)}


_LLAMA_ATTENTION = {
    "self_attn.q_proj.weight": (Target("attention.q.kernel", _heads_out),),
    "self_attn.q_proj.bias": (Target("attention.q.bias", _heads_bias),),
    "self_attn.k_proj.weight": (Target("attention.kv.kernel", _heads_out, ":, :, 0"),),
    "self_attn.k_proj.bias": (Target("attention.kv.bias", _heads_bias, ":, 0"),),
    "self_attn.v_proj.weight": (Target("attention.kv.kernel", _heads_out, ":, :, 1"),),
    "self_attn.v_proj.bias": (Target("attention.kv.bias", _heads_bias, ":, 1"),),
    "self_attn.o_proj.weight": (Target("attention.out.kernel", _heads_in),),
    "self_attn.o_proj.bias": (Target("attention.out.bias"),),
    "self_attn.q_norm.weight": (Target("attention.q_norm.scale"),),
    "self_attn.k_norm.weight": (Target("attention.k_norm.scale"),),
}
_LLAMA_MLP = {
    "mlp.gate_proj.weight": (Target("mlp.gate_up.kernel", _transposed, ":, 0"),),
    "mlp.gate_proj.bias": (Target("mlp.gate_up.bias", slot="0"),),
    "mlp.up_proj.weight": (Target("mlp.gate_up.kernel", _transposed, ":, 1"),),
    "mlp.up_proj.bias": (Target("mlp.gate_up.bias", slot="1"),),
    "mlp.down_proj.weight": (Target("mlp.down.kernel", _transposed),),
    "mlp.down_proj.bias": (Target("mlp.down.bias"),),
}
_MIXTRAL_MOE = {
    "block_sparse_moe.gate.weight": (Target("mlp.router.kernel", _transposed),),
    "block_sparse_moe.experts.{expert}.w1.weight": (Target("mlp.experts.gate_up", _transposed, "{expert}, :, 0"),),
    "block_sparse_moe.experts.{expert}.w3.weight": (Target("mlp.experts.gate_up", _transposed, "{expert}, :, 1"),),
    "block_sparse_moe.experts.{expert}.w2.weight": (Target("mlp.experts.down", _transposed, "{expert}"),),
}
_PRE_NORMS = _norm("input_layernorm", "pre_attention_norm") | _norm("post_attention_layernorm", "pre_mlp_norm")
_SANDWICH_NORMS = (
    _norm("input_layernorm", "pre_attention_norm")
    | _norm("post_attention_layernorm", "post_attention_norm")
    | _norm("pre_feedforward_layernorm", "pre_mlp_norm")
    | _norm("post_feedforward_layernorm", "post_mlp_norm")
)
_LLAMA_OUTSIDE = (
    move("[model.]embed_tokens.weight", Target("embed.kernel")),
    move("[model.]norm.weight", Target("final_norm.scale")),
    ignore(r".*rotary_emb\.inv_freq", "rotary frequencies are computed from the configuration"),
    *_head("lm_head.weight"),
)
LLAMA = (*_LLAMA_OUTSIDE, *_layers("[model.]layers", _PRE_NORMS | _LLAMA_ATTENTION | _LLAMA_MLP))
GEMMA3 = (*_LLAMA_OUTSIDE, *_layers("[model.]layers", _SANDWICH_NORMS | _LLAMA_ATTENTION | _LLAMA_MLP))
MIXTRAL = (*_LLAMA_OUTSIDE, *_layers("[model.]layers", _PRE_NORMS | _LLAMA_ATTENTION | _MIXTRAL_MOE))
GPT2 = (
    move("[transformer.]wte.weight", Target("embed.kernel")),
    move("[transformer.]wpe.weight", Target("positions.kernel")),
    move("[transformer.]ln_f.weight", Target("final_norm.scale")),
    move("[transformer.]ln_f.bias", Target("final_norm.bias")),
    ignore(r"(transformer\.)?h\.\d+\.attn\.(masked_)?bias", "a causal mask"),
    *_head("lm_head.weight"),
    *_layers(
        "[transformer.]h",
        _norm("ln_1", "pre_attention_norm")
        | _norm("ln_2", "pre_mlp_norm")
        | {
            "attn.c_attn.weight": (
                Target("attention.q.kernel", _blocks(_Q)),
                Target("attention.kv.kernel", _blocks(_KV)),
            ),
            "attn.c_attn.bias": (Target("attention.q.bias", _blocks(_Q)), Target("attention.kv.bias", _blocks(_KV))),
            "attn.c_proj.weight": (Target("attention.out.kernel", _conv1d_out),),
            "attn.c_proj.bias": (Target("attention.out.bias"),),
            "mlp.c_fc.weight": (Target("mlp.up.kernel"),),
            "mlp.c_fc.bias": (Target("mlp.up.bias"),),
            "mlp.c_proj.weight": (Target("mlp.down.kernel"),),
            "mlp.c_proj.bias": (Target("mlp.down.bias"),),
        },
    ),
)
GPT_NEOX = (
    move("[gpt_neox.]embed_in.weight", Target("embed.kernel")),
    move("[gpt_neox.]final_layer_norm.weight", Target("final_norm.scale")),
    move("[gpt_neox.]final_layer_norm.bias", Target("final_norm.bias")),
    ignore(r"(gpt_neox\.)?layers\.\d+\.attention\.(masked_)?bias", "a causal mask"),
    ignore(r".*rotary_emb\.inv_freq", "rotary frequencies are computed from the configuration"),
    *_head("embed_out.weight"),
    *_layers(
        "[gpt_neox.]layers",
        _PRE_NORMS
        | {
            "attention.query_key_value.weight": (
                Target("attention.q.kernel", _interleaved(_Q)),
                Target("attention.kv.kernel", _interleaved(_KV)),
            ),
            "attention.query_key_value.bias": (
                Target("attention.q.bias", _interleaved(_Q)),
                Target("attention.kv.bias", _interleaved(_KV)),
            ),
            "attention.dense.weight": (Target("attention.out.kernel", _heads_in),),
            "attention.dense.bias": (Target("attention.out.bias"),),
            "mlp.dense_h_to_4h.weight": (Target("mlp.up.kernel", _transposed),),
            "mlp.dense_h_to_4h.bias": (Target("mlp.up.bias"),),
            "mlp.dense_4h_to_h.weight": (Target("mlp.down.kernel", _transposed),),
            "mlp.dense_4h_to_h.bias": (Target("mlp.down.bias"),),
        },
    ),
)
