"""Combines what a probe found in each layer into one decoder configuration and a place for every parameter."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence, Set
from typing import Any

import numpy as np

from convert.probe.attention import FoundAttention
from convert.probe.experts import expert_tensors
from convert.probe.latent import FoundLatentAttention
from convert.probe.layer import FoundLayer
from convert.probe.mlp import FoundMLP
from convert.probe.moe import FoundMoE
from convert.probe.names import Places
from convert.probe.outside import FoundEmbedding, FoundHead
from convert.probe.rules import (
    Assignments,
    Channels,
    Oriented,
    Shaped,
    Slices,
    add_channels,
    add_heads,
    add_linear,
    add_norm,
    add_output_projection,
    add_tensor,
)
from convert.probe.trace import MATCH, NormCall, Trace, distance
from tide_jax.errors import TideError
from tide_jax.model.architecture import DecoderConfig

_CONTEXT_FIELDS = r"max_position|n_positions|n_ctx|max_seq|seq_len|context|block_size|max_len|max_target_positions"
_DEFAULT_CONTEXT = 2048
Flags = dict[str, Any]


def decoder_of(
    trace: Trace, model_type: str, embedding: FoundEmbedding, layers: Sequence[FoundLayer], head: FoundHead
) -> DecoderConfig:
    """Returns the configuration that fits all parts.

    Raises:
      TideError: layers differ in something for which a `DecoderConfig` has one flag.
    """
    flags = _common_flags(layers)
    kinds = [layer.attention.kind for layer in layers]
    types = tuple(dict.fromkeys(kinds))
    flags |= _norm_flags(trace, list(_block_norms(embedding, layers, head)))
    flags |= _outer_flags(trace, embedding, head)
    if flags.get("positions") is None:
        flags["positions"] = "rope" if any(kind.rope for kind in types) else "none"
    return DecoderConfig(
        model_type=model_type,
        num_layers=len(layers),
        attention_types=types,
        layer_pattern=tuple(types.index(kind) for kind in kinds),
        **flags,
    )


def _common_flags(layers: Sequence[FoundLayer]) -> Flags:
    """Flags of all layers, with and without experts."""
    found = [_layer_flags(layer) for layer in layers]
    names = [f"layer {i}" for i in range(len(layers))]
    with_experts = [i for i, flags in enumerate(found) if "moe" in flags]
    dense = [i for i in range(len(layers)) if i not in with_experts]
    if not with_experts:
        return _require_equal_flags(found, names)
    # Layers with experts must agree with each other.
    flags = _require_equal_flags([found[i] for i in with_experts], [names[i] for i in with_experts])
    moe = flags.pop("moe")
    flags.setdefault("intermediate_size", moe.intermediate_size)
    if dense:
        # Layers without experts must agree with them in everything but the size and bias of the MLP.
        plain = _require_equal_flags([found[i] for i in dense], [names[i] for i in dense])
        flags = {**flags, "intermediate_size": plain["intermediate_size"], "mlp_bias": plain["mlp_bias"]}
        _require_equal_flags([plain, flags], [names[dense[0]], names[with_experts[0]]])
        moe = dataclasses.replace(moe, layers=tuple(with_experts))
    return flags | {"moe": moe}


def _require_equal_flags(found: Sequence[Flags], names: Sequence[str]) -> Flags:
    """Returns the flags if all are equal. Raises TideError if they differ."""
    for flags, name in zip(found, names, strict=True):
        for key in {*flags, *found[0]}:
            if flags.get(key) != found[0].get(key):
                raise TideError(
                    f"{names[0]} has {key}={found[0].get(key)!r} and {name} has {flags.get(key)!r}: "
                    "expected the same in all layers"
                )
    return dict(found[0])


def _layer_flags(layer: FoundLayer) -> Flags:
    attention, mlp = layer.attention, layer.mlp
    flags: Flags = {
        "norm_placement": layer.placement,
        "parallel_residual": layer.parallel,
        "shared_norm": layer.shared,
        "residual_scale": layer.residual_scale,
        "hidden_size": attention.out.output.shape[1],
        "sub_norm": attention.sub_norm is not None,
    }
    return flags | _attention_flags(attention) | _mlp_flags(mlp)


def _latent_flags(attention: FoundLatentAttention) -> Flags:
    down = {linear.bias is not None for linear in (attention.q_down, attention.kv_down) if linear is not None}
    if len(down) > 1 or attention.q.bias is not None or attention.kv_up.bias is not None:
        raise TideError(
            "some projections of latent attention have a bias, expected all those into the bottlenecks or none"
        )
    spec = attention.spec
    return {
        "latent": spec.latent,
        "num_heads": spec.heads,
        "num_kv_heads": spec.heads,
        "head_dim": spec.latent.nope_dim + spec.latent.rope_dim,
        "qkv_bias": down.pop(),
        "attention_out_bias": attention.out.bias is not None,
    }


def _attention_flags(attention: FoundAttention | FoundLatentAttention) -> Flags:
    if isinstance(attention, FoundLatentAttention):
        return _latent_flags(attention)
    arrangement = attention.spec.arrangement
    gate = attention.gate
    kind = "none" if gate is None else "head" if gate.output.shape[1] == arrangement.heads else "channel"
    return {
        "num_heads": arrangement.heads,
        "num_kv_heads": arrangement.kv_heads,
        "head_dim": arrangement.width,
        **_projection_biases(attention),
        "attention_out_bias": attention.out.bias is not None,
        "attention_gate": kind,
        "attention_softcap": attention.spec.softcap,
        "clip_qkv": attention.spec.clip,
    }


def _projection_biases(attention: FoundAttention) -> Flags:
    q, k, v = (part.linear.bias is not None for part in (attention.q, attention.k, attention.v))
    if q and v and not k:
        return {"qkv_bias": True, "key_bias": False}
    if not q == k == v:
        raise TideError("only some of queries, keys and values have a bias, expected all, none, or all but the keys")
    return {"qkv_bias": q}


def _mlp_flags(mlp: FoundMLP | FoundMoE) -> Flags:
    if isinstance(mlp, FoundMoE):
        return _mixture_flags(mlp)
    biases = {linear.bias is not None for linear in mlp.linears}
    if len(biases) > 1:
        raise TideError("only some of the feed-forward block's linear maps have a bias, expected all or none")
    return {
        "intermediate_size": mlp.down.inputs.shape[1],
        "activation": mlp.activation,
        "activation_limit": mlp.limit,
        "mlp_gated": mlp.gate is not None,
        "mlp_bias": biases.pop(),
    }


def _mixture_flags(mlp: FoundMoE) -> Flags:
    flags: Flags = {"moe": mlp.moe, "activation": mlp.activation, "activation_limit": mlp.limit, "mlp_gated": True}
    if mlp.shared is not None:
        shared = _mlp_flags(mlp.shared)
        flags["mlp_bias"] = shared["mlp_bias"]
        if not shared["mlp_gated"] or shared["activation"] != mlp.activation:
            raise TideError("routed and shared experts differ in their activation or gate, expected the same")
    return flags


def _block_norms(embedding: FoundEmbedding, layers: Sequence[FoundLayer], head: FoundHead) -> Iterable[NormCall]:
    """Every norm whose flags come from the decoder."""
    around = [norm for layer in layers for norm in layer.norms.values()]
    dense = [layer.mlp.shared if isinstance(layer.mlp, FoundMoE) else layer.mlp for layer in layers]
    inner = [layer.attention.sub_norm for layer in layers] + [mlp.sub_norm for mlp in dense if mlp is not None]
    return (norm for norm in (*around, *inner, embedding.norm, head.norm) if norm is not None)


def _norm_flags(trace: Trace, norms: Sequence[NormCall]) -> Flags:
    norms = _unify_eps(trace, norms)
    found = [
        {
            "norm": norm.kind,
            "norm_eps": norm.eps,
            "norm_scale": norm.scale is not None,
            "norm_bias": norm.bias is not None,
            "norm_unit_offset": norm.unit_offset,
        }
        for norm in norms
    ]
    return _require_equal_flags(found, [norm.name or "a norm without a module" for norm in norms]) if found else {}


def _unify_eps(trace: Trace, norms: Sequence[NormCall]) -> Sequence[NormCall]:
    """Gives all norms one eps that fits all of them, if there is one. Among large numbers, eps hardly shows."""

    def error(eps: float) -> float:
        unified = (dataclasses.replace(norm, eps=eps) for norm in norms)
        return max(distance(norm.apply(norm.inputs, trace.weights), norm.output) for norm in unified)

    candidates = list(dict.fromkeys(norm.eps for norm in norms))
    if len(candidates) < 2:
        return norms
    best = min(candidates, key=error)
    return [dataclasses.replace(norm, eps=best) for norm in norms] if error(best) <= MATCH else norms


def _outer_flags(trace: Trace, embedding: FoundEmbedding, head: FoundHead) -> Flags:
    table, matrix = trace.weights[embedding.table], trace.weights[head.weight]
    if table.shape != matrix.shape:
        raise TideError(f"the embedding has shape {table.shape} and the head {matrix.shape}, expected equal shapes")
    flags: Flags = {
        "vocab_size": table.shape[0],
        "embedding_scale": None if embedding.scale == 1.0 else embedding.scale,
        "embedding_norm": embedding.norm is not None,
        "final_norm": head.norm is not None,
        "logit_scale": head.scale,
        "logit_softcap": head.softcap,
        "tie_embeddings": np.shares_memory(table, matrix),
        "head_bias": head.bias is not None,
        "max_positions": context_length(trace, embedding)[0],
    }
    if (embedding.project is None) != (head.project is None):
        raise TideError("only one of embedding and head has a projection between widths, expected both or none")
    if embedding.project is not None and head.project is not None:
        if embedding.project.bias or head.project.bias:
            raise TideError("a projection between widths has a bias, which is not supported")
        flags["embedding_size"] = table.shape[1]
    if embedding.positions is not None:
        rows = _row_count(trace.weights[embedding.positions])
        flags |= {"positions": "learned", "learned_positions": rows, "position_offset": embedding.offset}
    return flags


def _row_count(table: np.ndarray) -> int:
    return table.size // table.shape[-1]


def context_length(trace: Trace, embedding: FoundEmbedding) -> tuple[int, bool]:
    """Maximum number of positions, and whether the checkpoint states it."""
    if embedding.positions is not None:
        return _row_count(trace.weights[embedding.positions]) - embedding.offset, True
    named = [int(v) for v in trace.numbers_named(_CONTEXT_FIELDS) if v >= 1]
    return (named[0], True) if named else (_DEFAULT_CONTEXT, False)


def outer_tensors(trace: Trace, config: DecoderConfig, embedding: FoundEmbedding, head: FoundHead) -> Assignments:
    """Places of the parameters outside the layers."""
    assignments: Assignments = {}
    add_tensor(assignments, embedding.table, "embed.kernel")
    if embedding.positions is not None:
        shape = Shaped((config.learned_positions, config.hidden_size))
        add_tensor(assignments, embedding.positions, "positions.kernel", shape)
    add_norm(assignments, embedding.norm, "embedding_norm")
    add_norm(assignments, head.norm, "final_norm")
    for linear, path in ((embedding.project, "project_in"), (head.project, "project_out")):
        if linear is not None:
            add_linear(assignments, linear, path)
    if not config.tie_embeddings:
        add_tensor(assignments, head.weight, "head.kernel")
    if head.bias is not None:
        add_tensor(assignments, head.bias, "head.bias")
    return assignments


def layer_tensors(trace: Trace, layer: FoundLayer, slices: Slices) -> Assignments:
    """Places of a layer's parameters, relative to the layer; adds single experts of stacked parameters to `slices`."""
    assignments: Assignments = {}
    for name, norm in layer.norms.items():
        add_norm(assignments, norm, name)
    _attention_tensors(assignments, layer.attention)
    if isinstance(layer.mlp, FoundMLP):
        _mlp_tensors(assignments, layer.mlp, "mlp")
    else:
        _mixture_tensors(assignments, layer.mlp, slices, trace)
    return assignments


def _mixture_tensors(assignments: Assignments, mlp: FoundMoE, slices: Slices, trace: Trace) -> None:
    expert_tensors(assignments, slices, mlp.experts, trace.weights)
    add_tensor(assignments, mlp.router, "mlp.router.kernel", Oriented())
    for name, path in ((mlp.router_bias, "mlp.router.bias"), (mlp.correction, "mlp.correction")):
        if name is not None:
            add_tensor(assignments, name, path, Shaped((mlp.moe.num_experts,)))
    if mlp.shared is not None:
        _mlp_tensors(assignments, mlp.shared, "mlp.shared")
    if mlp.shared_gate is not None:
        add_linear(assignments, mlp.shared_gate, "mlp.shared_gate")


def _latent_tensors(assignments: Assignments, attention: FoundLatentAttention) -> None:
    heads, latent = attention.spec.heads, attention.spec.latent
    both = latent.nope_dim + latent.value_dim
    if attention.q_down is not None:
        add_linear(assignments, attention.q_down, "attention.q_down")
    add_norm(assignments, attention.q_norm, "attention.q_norm")
    add_norm(assignments, attention.kv_norm, "attention.kv_norm")
    add_linear(assignments, attention.kv_down, "attention.kv_down")
    width = latent.nope_dim + latent.rope_dim
    queries = Channels(attention.q.transposed, 0, heads, width, width, heads=True)
    add_channels(assignments, attention.q, "attention.q", queries)
    for path, start, size in (("k_up", 0, latent.nope_dim), ("v_up", latent.nope_dim, latent.value_dim)):
        take = Channels(attention.kv_up.transposed, start, heads, both, size, heads=True)
        add_channels(assignments, attention.kv_up, f"attention.{path}", take)
    add_output_projection(assignments, attention.out, "attention.out", heads)


def _attention_tensors(assignments: Assignments, attention: FoundAttention | FoundLatentAttention) -> None:
    if isinstance(attention, FoundLatentAttention):
        _latent_tensors(assignments, attention)
        return
    arrangement, flags = attention.spec.arrangement, attention.spec.kind.qk_norm
    add_heads(assignments, attention.q, "attention.q")
    add_heads(assignments, attention.k, "attention.kv", "0")
    values = attention.v
    if values.linear.bias is not None and attention.k.linear.bias is None:
        take = Channels(False, values.starts[0], len(values.starts), values.width, values.width, heads=True)
        add_tensor(assignments, values.linear.bias, "attention.value_bias", take)
        values = dataclasses.replace(values, linear=dataclasses.replace(values.linear, bias=None))
    add_heads(assignments, values, "attention.kv", "1")
    add_output_projection(assignments, attention.out, "attention.out", arrangement.heads)
    for norm, name, heads in (
        (attention.q_norm, "attention.q_norm", arrangement.heads),
        (attention.k_norm, "attention.k_norm", arrangement.kv_heads),
    ):
        per_head = flags is not None and (flags.all_heads or flags.per_head)
        add_norm(assignments, norm, name, (heads, arrangement.width) if per_head else None)
    add_norm(assignments, attention.sub_norm, "attention.sub_norm", (arrangement.heads, arrangement.width))
    if attention.gate is not None:
        width = attention.gate.output.shape[1] // arrangement.heads
        take = Channels(attention.gate.transposed, 0, arrangement.heads, width, width, heads=True)
        add_channels(assignments, attention.gate, "attention.gate", take)
    if attention.sinks is not None:
        add_tensor(assignments, attention.sinks, "attention.sinks")


def _mlp_tensors(assignments: Assignments, mlp: FoundMLP, path: str) -> None:
    add_linear(assignments, mlp.down, f"{path}.down")
    add_norm(assignments, mlp.sub_norm, f"{path}.sub_norm")
    if mlp.gate is None:
        add_linear(assignments, mlp.up, f"{path}.up")
    elif mlp.layout is None:
        add_linear(assignments, mlp.gate, f"{path}.gate_up", "0")
        add_linear(assignments, mlp.up, f"{path}.gate_up", "1")
    else:
        for part in (0, 1):
            add_channels(assignments, mlp.up, f"{path}.gate_up", _gate_or_up(mlp, part), str(part))


def _gate_or_up(mlp: FoundMLP, part: int) -> Channels:
    """The gate (0) or up (1) projection within a linear map that holds both."""
    size, which = mlp.down.inputs.shape[1], part ^ mlp.swapped
    if mlp.layout == "halves":
        return Channels(mlp.up.transposed, which * size, 1, size, size)
    return Channels(mlp.up.transposed, which, size, 2, 1)


def places_of(
    trace: Trace, config: DecoderConfig, embedding: FoundEmbedding, layers: Sequence[FoundLayer], head: FoundHead
) -> Places:
    """Places of all parameters of the reference."""
    slices: list[Slices] = [{} for _ in layers]
    inside = [layer_tensors(trace, layer, parts) for layer, parts in zip(layers, slices, strict=True)]
    outside = outer_tensors(trace, config, embedding, head)
    assignments = {name for part in (outside, *inside) for name in part}
    return Places(trace.weights, inside, slices, outside, _ignore_reasons(trace, assignments))


def _ignore_reasons(trace: Trace, assignments: Set[str]) -> dict[str, str]:
    """Parameters of the reference that no part of the decoder needs, each with the reason."""
    import torch

    ran = {call.name for call in trace.calls}
    modules = dict(trace.reference.model.named_modules())
    assigned_addresses = {trace.weights[name].__array_interface__["data"][0] for name in assignments}
    reasons: dict[str, str] = {}
    for name, weight in trace.weights.items():
        owner, _, short = name.rpartition(".")
        if name in assignments:
            continue
        if not isinstance(getattr(modules.get(owner), short, None), torch.nn.Parameter):
            reasons[name] = "a constant, not a weight"
        elif weight.__array_interface__["data"][0] in assigned_addresses:
            reasons[name] = "tied to another tensor"
        else:
            unused = "no part of the decoder needs it: logits are right without"
            reasons[name] = unused if owner in ran else "takes no part in reading text"
    return reasons
