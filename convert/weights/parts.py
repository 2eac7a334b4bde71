"""Tables of checkpoint names for common parts of a decoder; families assemble their weight maps from them.

A table maps a module or tensor name inside a layer to the targets it fills. Tables may list more names than a family
has: rules that match nothing are harmless, and every match must fit the family's configuration exactly.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping

from convert.weights import takes
from convert.weights.rules import Rule, Take, Target, ignore, move, whole_tensor
from tide_jax.model.architecture import AttentionType, DecoderConfig

Names = Mapping[str, tuple[Target, ...]]


def linear(name: str, path: str, weight: Take = takes.transpose, bias: Take | None = None, slot: str = "") -> Names:
    """Names of a Linear's weight and bias; `slot` indexes the parameter without the kernel's input axis."""
    kernel_slot = f":, {slot}" if slot else ""
    return {
        f"{name}.weight": (Target(f"{path}.kernel", weight, kernel_slot),),
        f"{name}.bias": (Target(f"{path}.bias", *(() if bias is None else (bias,)), slot=slot),),
    }


def norm(name: str, path: str, take: Take = whole_tensor) -> Names:
    """Names of a norm's weight and bias."""
    return {
        f"{name}.weight": (Target(f"{path}.scale", take),),
        f"{name}.bias": (Target(f"{path}.bias", take),),
    }


def mlp(name: str, path: str, gate: str = "gate_proj", up: str = "up_proj", down: str = "down_proj") -> Names:
    """Names of an MLP with a gate."""
    return {
        **linear(f"{name}.{gate}", f"{path}.gate_up", slot="0"),
        **linear(f"{name}.{up}", f"{path}.gate_up", slot="1"),
        **linear(f"{name}.{down}", f"{path}.down"),
    }


def plain_mlp(up: str, down: str) -> Names:
    """Names of an MLP without a gate."""
    return {**linear(up, "mlp.up"), **linear(down, "mlp.down")}


def attention(name: str, q: str = "q_proj", k: str = "k_proj", v: str = "v_proj", out: str = "out_proj") -> Names:
    """Linears for queries, keys, values and output inside one module."""
    return {
        **linear(f"{name}.{q}", "attention.q", takes.heads_out, takes.heads_bias),
        **linear(f"{name}.{k}", "attention.kv", takes.heads_out, takes.heads_bias, slot=":, 0"),
        **linear(f"{name}.{v}", "attention.kv", takes.heads_out, takes.heads_bias, slot=":, 1"),
        **linear(f"{name}.{out}", "attention.out", takes.heads_in),
    }


def latent_attention(name: str) -> Names:
    """Multi-head latent attention in one module."""
    return {
        **linear(f"{name}.q_proj", "attention.q", takes.heads_out),
        **linear(f"{name}.q_a_proj", "attention.q_down"),
        **norm(f"{name}.q_a_layernorm", "attention.q_norm"),
        **linear(f"{name}.q_b_proj", "attention.q", takes.heads_out),
        **linear(f"{name}.kv_a_proj_with_mqa", "attention.kv_down"),
        **norm(f"{name}.kv_a_layernorm", "attention.kv_norm"),
        f"{name}.kv_b_proj.weight": (
            Target("attention.k_up.kernel", takes.latent_keys),
            Target("attention.v_up.kernel", takes.latent_values),
        ),
        **linear(f"{name}.g_proj", "attention.gate", takes.attention_gate),
        **linear(f"{name}.o_proj", "attention.out", takes.heads_in),
        **linear(f"{name}.dense", "attention.out", takes.heads_in),
    }


def experts(name: str, gate: str = "gate_proj", up: str = "up_proj", down: str = "down_proj") -> Names:
    """Experts stored one by one."""
    each = f"{name}.{{expert}}"
    return {
        f"{each}.{gate}.weight": (Target("mlp.experts.gate_up", takes.transpose, "{expert}, :, 0"),),
        f"{each}.{up}.weight": (Target("mlp.experts.gate_up", takes.transpose, "{expert}, :, 1"),),
        f"{each}.{down}.weight": (Target("mlp.experts.down", takes.transpose, "{expert}"),),
    }


def fused_qkv(name: str, q: Take, kv: Take) -> Names:
    """One Linear for queries, keys and values."""
    return {
        f"{name}.weight": (Target("attention.q.kernel", q), Target("attention.kv.kernel", kv)),
        f"{name}.bias": (Target("attention.q.bias", q), Target("attention.kv.bias", kv)),
    }


def layer_rules(
    prefix: str,
    *parts: Names,
    when: Callable[[DecoderConfig], bool] | None = None,
    layers: Callable[[DecoderConfig], Collection[int]] | None = None,
    place: Callable[[int], int] | None = None,
) -> tuple[Rule, ...]:
    """Rules for the layers' tensors; target paths are relative to the layer. See `Rule` for the arguments."""
    names = {name: targets for part in parts for name, targets in part.items()}
    rules = (
        move(
            f"{prefix}.{{layer}}.{name}",
            *(dataclasses.replace(target, path=f"layers.{{layer}}.{target.path}") for target in targets),
            when=when,
        )
        for name, targets in names.items()
    )
    return tuple(dataclasses.replace(rule, layers=layers, place=place) for rule in rules)


def in_module(path: str, names: Names) -> Names:
    """The same names for a module at another path inside the layer: the first part of each target's path changes."""
    return {
        name: tuple(dataclasses.replace(t, path=f"{path}.{t.path.partition('.')[2]}") for t in targets)
        for name, targets in names.items()
    }


def layers_with_attention(config: DecoderConfig) -> list[int]:
    """Layers whose mixer is attention, for `layer_rules`."""
    return [i for i in range(config.num_layers) if isinstance(config.layer_type(i), AttentionType)]


def layers_with_state(config: DecoderConfig) -> list[int]:
    """The other layers."""
    return [i for i in range(config.num_layers) if not isinstance(config.layer_type(i), AttentionType)]


def has_own_head(config: DecoderConfig) -> bool:
    """Whether the head has its own weights."""
    return not config.tie_embeddings


def has_tied_head(config: DecoderConfig) -> bool:
    """Whether the head is the embedding."""
    return config.tie_embeddings


def outer_rules(embed: str, final_norm: str, head: str = "lm_head") -> tuple[Rule, ...]:
    """Rules for the embedding, the final norm and the head."""
    return (
        move(f"{embed}.weight", Target("embed.kernel")),
        move(f"{final_norm}.weight", Target("final_norm.scale")),
        move(f"{final_norm}.bias", Target("final_norm.bias")),
        move(f"{head}.weight", Target("head.kernel"), when=has_own_head),
        move(f"{head}.bias", Target("head.bias")),
        ignore(move(f"{head}.weight").pattern, "tied to the token embedding", when=has_tied_head),
        ignore(r".*rotary_emb\.inv_freq", "rotary frequencies are computed from the configuration"),
    )


def embedding_norm_rules(name: str) -> tuple[Rule, ...]:
    """Rules for the norm after the embedding."""
    return move(f"{name}.weight", Target("embedding_norm.scale")), move(f"{name}.bias", Target("embedding_norm.bias"))


def width_projection_rules(into: str, out: str) -> tuple[Rule, ...]:
    """Rules for the projections between the embeddings' width and the layers'."""
    return (
        move(f"{into}.weight", Target("project_in.kernel", takes.transpose)),
        move(f"{out}.weight", Target("project_out.kernel", takes.transpose)),
    )


def ignore_sinusoidal_table(name: str) -> Rule:
    """Ignores a table of sinusoidal positions, which the model computes."""
    return ignore(move(name).pattern, "sinusoidal positions are computed")


OUTER_RULES = outer_rules("[model.]embed_tokens", "[model.]norm")
ATTENTION: Names = {
    **linear("self_attn.q_proj", "attention.q", takes.heads_out, takes.heads_bias),
    **linear("self_attn.k_proj", "attention.kv", takes.heads_out, takes.heads_bias, slot=":, 0"),
    **linear("self_attn.v_proj", "attention.kv", takes.heads_out, takes.heads_bias, slot=":, 1"),
    **linear("self_attn.o_proj", "attention.out", takes.heads_in),
    **linear("self_attn.dense", "attention.out", takes.heads_in),
    **fused_qkv("self_attn.qkv_proj", takes.fused_q, takes.fused_kv),
    **norm("self_attn.q_norm", "attention.q_norm", takes.heads_norm),
    **norm("self_attn.k_norm", "attention.k_norm", takes.heads_norm),
    **norm("self_attn.q_layernorm", "attention.q_norm"),
    **norm("self_attn.k_layernorm", "attention.k_norm"),
    **norm("self_attn.query_layernorm", "attention.q_norm"),
    **norm("self_attn.key_layernorm", "attention.k_norm"),
    "self_attn.sinks": (Target("attention.sinks"),),
}
LATENT_ATTENTION = latent_attention("self_attn")
FAIRSEQ: Names = {**attention("self_attn"), **plain_mlp("fc1", "fc2")}
FAIRSEQ_PRE_NORMS: Names = {
    **norm("self_attn_layer_norm", "pre_attention_norm"),
    **norm("final_layer_norm", "pre_mlp_norm"),
}
FAIRSEQ_POST_NORMS: Names = {
    **norm("self_attn_layer_norm", "post_attention_norm"),
    **norm("final_layer_norm", "post_mlp_norm"),
}
MLP: Names = {**mlp("mlp", "mlp"), **linear("mlp.gate_up_proj", "mlp.gate_up", takes.halves, takes.halves)}
EXPERTS: Names = {
    **linear("mlp.gate", "mlp.router"),
    **linear("mlp.router", "mlp.router"),
    "mlp.gate.e_score_correction_bias": (Target("mlp.correction"),),
    **experts("mlp.experts"),
    **mlp("mlp.shared_expert", "mlp.shared"),
    **mlp("mlp.shared_experts", "mlp.shared"),
    **linear("mlp.shared_expert_gate", "mlp.shared_gate"),
}
MIXTRAL_EXPERTS: Names = {
    **linear("block_sparse_moe.gate", "mlp.router"),
    "block_sparse_moe.e_score_correction_bias": (Target("mlp.correction"),),
    **experts("block_sparse_moe.experts", "w1", "w3", "w2"),
}
PRE_NORMS: Names = {
    **norm("input_layernorm", "pre_attention_norm"),
    **norm("post_attention_layernorm", "pre_mlp_norm"),
}
POST_NORMS: Names = {
    **norm("post_attention_layernorm", "post_attention_norm"),
    **norm("post_feedforward_layernorm", "post_mlp_norm"),
}
SANDWICH_NORMS: Names = {
    **POST_NORMS,
    **norm("input_layernorm", "pre_attention_norm"),
    **norm("pre_feedforward_layernorm", "pre_mlp_norm"),
}


def llama_weights(
    norms: Names = PRE_NORMS, *more: Names, attention: Names = ATTENTION, top: tuple[Rule, ...] = OUTER_RULES
) -> tuple[Rule, ...]:
    """Weight map for checkpoints named like Llama's, with dense, fused or expert feed-forward blocks.

    Args:
      norms: names of the norms.
      more: further names inside a layer.
    """
    return (*top, *layer_rules("[model.]layers", norms, attention, MLP, EXPERTS, *more))


LLAMA = llama_weights()
