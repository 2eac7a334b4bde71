"""Combines what a probe found in each layer into one decoder configuration and a place for every parameter."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence, Set
from typing import Any

import numpy as np

from convert.probe.attention import AttentionFound
from convert.probe.experts import expert_tensors
from convert.probe.latent import LatentFound
from convert.probe.layer import LayerFound
from convert.probe.mlp import MLPFound
from convert.probe.moe import MoEFound
from convert.probe.names import Places
from convert.probe.outside import EmbeddingFound, HeadFound
from convert.probe.rules import (
    Assigned,
    Channels,
    Oriented,
    Shaped,
    Slices,
    add_channels,
    add_heads,
    add_linear,
    add_norm,
    add_out,
    add_tensor,
)
from convert.probe.trace import MATCH, NormCall, Trace, distance
from tide_jax.errors import TideError
from tide_jax.model.architecture import DecoderConfig

_CONTEXT = r"max_position|n_positions|n_ctx|max_seq|seq_len|context|block_size|max_len|max_target_positions"
_UNKNOWN_CONTEXT = 2048
Flags = dict[str, Any]


def decoder_of(
    trace: Trace, model_type: str, embedding: EmbeddingFound, layers: Sequence[LayerFound], head: HeadFound
) -> DecoderConfig:
    """Returns the configuration that fits all parts.

    Raises:
      TideError: layers differ in something for which a `DecoderConfig` has one flag.
    """
    flags = _common(layers)
    kinds = [layer.attention.kind for layer in layers]
    types = tuple(dict.fromkeys(kinds))
    flags |= _norm_flags(trace, list(_block_norms(embedding, layers, head)))
    flags |= _outside_flags(trace, embedding, head)
    if flags.get("positions") is None:
        flags["positions"] = "rope" if any(kind.rope for kind in types) else "none"
    return DecoderConfig(
        model_type=model_type,
        num_layers=len(layers),
        attention_types=types,
        attention_pattern=tuple(types.index(kind) for kind in kinds),
        **flags,
    )


def _common(layers: Sequence[LayerFound]) -> Flags:
    """Flags of all layers, with and without experts."""
    found = [_layer_flags(layer) for layer in layers]
    names = [f"layer {i}" for i in range(len(layers))]
    mixed = [i for i, flags in enumerate(found) if "moe" in flags]
    dense = [i for i in range(len(layers)) if i not in mixed]
    if not mixed:
        return _one(found, names)
    # Layers with experts must agree with each other.
    flags = _one([found[i] for i in mixed], [names[i] for i in mixed])
    moe = flags.pop("moe")
    flags.setdefault("intermediate_size", moe.intermediate_size)
    if dense:
        # Layers without experts must agree with them in everything but the size and bias of the MLP.
        plain = _one([found[i] for i in dense], [names[i] for i in dense])
        flags = {**flags, "intermediate_size": plain["intermediate_size"], "mlp_bias": plain["mlp_bias"]}
        _one([plain, flags], [names[dense[0]], names[mixed[0]]])
        moe = dataclasses.replace(moe, layers=tuple(mixed))
    return flags | {"moe": moe}


def _one(found: Sequence[Flags], names: Sequence[str]) -> Flags:
    """Returns the flags if all are equal. Raises TideError if they differ."""
    for flags, name in zip(found, names, strict=True):
        for key in {*flags, *found[0]}:
            if flags.get(key) != found[0].get(key):
                raise TideError(
                    f"{names[0]} has {key}={found[0].get(key)!r} and {name} has {flags.get(key)!r}: "
                    "a decoder has one for all layers"
                )
    return dict(found[0])


def _layer_flags(layer: LayerFound) -> Flags:
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


def _latent_flags(attention: LatentFound) -> Flags:
    down = {linear.bias is not None for linear in (attention.q_down, attention.kv_down) if linear is not None}
    if len(down) > 1 or attention.q.bias is not None or attention.kv_up.bias is not None:
        raise TideError("of latent attention's projections all those into the bottlenecks may have a bias, no others")
    spec = attention.spec
    return {
        "latent": spec.latent,
        "num_heads": spec.heads,
        "num_kv_heads": spec.heads,
        "head_dim": spec.latent.nope_dim + spec.latent.rope_dim,
        "qkv_bias": down.pop(),
        "attention_out_bias": attention.out.bias is not None,
    }


def _attention_flags(attention: AttentionFound | LatentFound) -> Flags:
    if isinstance(attention, LatentFound):
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


def _projection_biases(attention: AttentionFound) -> Flags:
    q, k, v = (part.linear.bias is not None for part in (attention.q, attention.k, attention.v))
    if q and v and not k:
        return {"qkv_bias": True, "key_bias": False}
    if not q == k == v:
        raise TideError("some of queries, keys and values have a bias: only all of them, or all but the keys, may")
    return {"qkv_bias": q}


def _mlp_flags(mlp: MLPFound | MoEFound) -> Flags:
    if isinstance(mlp, MoEFound):
        return _mixture_flags(mlp)
    biases = {linear.bias is not None for linear in mlp.linears}
    if len(biases) > 1:
        raise TideError("some of the feed-forward block's linear maps have a bias and some have not")
    return {
        "intermediate_size": mlp.down.inputs.shape[1],
        "activation": mlp.activation,
        "activation_limit": mlp.limit,
        "mlp_gated": mlp.gate is not None,
        "mlp_bias": biases.pop(),
    }


def _mixture_flags(mlp: MoEFound) -> Flags:
    flags: Flags = {"moe": mlp.moe, "activation": mlp.activation, "activation_limit": mlp.limit, "mlp_gated": True}
    if mlp.shared is not None:
        shared = _mlp_flags(mlp.shared)
        flags["mlp_bias"] = shared["mlp_bias"]
        if not shared["mlp_gated"] or shared["activation"] != mlp.activation:
            raise TideError("routed and shared experts differ in their activation or gate")
    return flags


def _block_norms(embedding: EmbeddingFound, layers: Sequence[LayerFound], head: HeadFound) -> Iterable[NormCall]:
    """Every norm whose flags come from the decoder."""
    around = [norm for layer in layers for norm in layer.norms.values()]
    dense = [layer.mlp.shared if isinstance(layer.mlp, MoEFound) else layer.mlp for layer in layers]
    inner = [layer.attention.sub_norm for layer in layers] + [mlp.sub_norm for mlp in dense if mlp is not None]
    return (norm for norm in (*around, *inner, embedding.norm, head.norm) if norm is not None)


def _norm_flags(trace: Trace, norms: Sequence[NormCall]) -> Flags:
    norms = _one_eps(trace, norms)
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
    return _one(found, [norm.name or "a norm without a module" for norm in norms]) if found else {}


def _one_eps(trace: Trace, norms: Sequence[NormCall]) -> Sequence[NormCall]:
    """Gives all norms one eps that fits all of them, if there is one. Among large numbers, eps hardly shows."""

    def error(eps: float) -> float:
        alike = (dataclasses.replace(norm, eps=eps) for norm in norms)
        return max(distance(norm.apply(norm.inputs, trace.weights), norm.output) for norm in alike)

    candidates = list(dict.fromkeys(norm.eps for norm in norms))
    if len(candidates) < 2:
        return norms
    best = min(candidates, key=error)
    return [dataclasses.replace(norm, eps=best) for norm in norms] if error(best) <= MATCH else norms


def _outside_flags(trace: Trace, embedding: EmbeddingFound, head: HeadFound) -> Flags:
    table, matrix = trace.weights[embedding.table], trace.weights[head.weight]
    if table.shape != matrix.shape:
        raise TideError(f"the embedding has shape {table.shape} and the head {matrix.shape}: they must have the same")
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
        raise TideError("only one of embedding and head has a projection between widths: both or none may")
    if embedding.project is not None and head.project is not None:
        if embedding.project.bias or head.project.bias:
            raise TideError("a projection between widths has a bias, which is not supported")
        flags["embedding_size"] = table.shape[1]
    if embedding.positions is not None:
        rows = _rows(trace.weights[embedding.positions])
        flags |= {"positions": "learned", "learned_positions": rows, "position_offset": embedding.offset}
    return flags


def _rows(table: np.ndarray) -> int:
    return table.size // table.shape[-1]


def context_length(trace: Trace, embedding: EmbeddingFound) -> tuple[int, bool]:
    """Maximum number of positions, and whether the checkpoint states it."""
    if embedding.positions is not None:
        return _rows(trace.weights[embedding.positions]) - embedding.offset, True
    named = [int(v) for v in trace.numbers(_CONTEXT) if v >= 1]
    return (named[0], True) if named else (_UNKNOWN_CONTEXT, False)


def outside_tensors(trace: Trace, config: DecoderConfig, embedding: EmbeddingFound, head: HeadFound) -> Assigned:
    """Places of the parameters outside the layers."""
    assigned: Assigned = {}
    add_tensor(assigned, embedding.table, "embed.kernel")
    if embedding.positions is not None:
        shape = Shaped((config.learned_positions, config.hidden_size))
        add_tensor(assigned, embedding.positions, "positions.kernel", shape)
    add_norm(assigned, embedding.norm, "embedding_norm")
    add_norm(assigned, head.norm, "final_norm")
    for linear, path in ((embedding.project, "project_in"), (head.project, "project_out")):
        if linear is not None:
            add_linear(assigned, linear, path)
    if not config.tie_embeddings:
        add_tensor(assigned, head.weight, "head.kernel")
    if head.bias is not None:
        add_tensor(assigned, head.bias, "head.bias")
    return assigned


def layer_tensors(trace: Trace, layer: LayerFound, slices: Slices) -> Assigned:
    """Places of a layer's parameters, relative to the layer; adds single experts of stacked parameters to `slices`."""
    assigned: Assigned = {}
    for name, norm in layer.norms.items():
        add_norm(assigned, norm, name)
    _attention_tensors(assigned, layer.attention)
    if isinstance(layer.mlp, MLPFound):
        _mlp_tensors(assigned, layer.mlp, "mlp")
    else:
        _mixture_tensors(assigned, layer.mlp, slices, trace)
    return assigned


def _mixture_tensors(assigned: Assigned, mlp: MoEFound, slices: Slices, trace: Trace) -> None:
    expert_tensors(assigned, slices, mlp.experts, trace.weights)
    add_tensor(assigned, mlp.router, "mlp.router.kernel", Oriented())
    for name, path in ((mlp.router_bias, "mlp.router.bias"), (mlp.correction, "mlp.correction")):
        if name is not None:
            add_tensor(assigned, name, path, Shaped((mlp.moe.num_experts,)))
    if mlp.shared is not None:
        _mlp_tensors(assigned, mlp.shared, "mlp.shared")
    if mlp.shared_gate is not None:
        add_linear(assigned, mlp.shared_gate, "mlp.shared_gate")


def _latent_tensors(assigned: Assigned, attention: LatentFound) -> None:
    heads, latent = attention.spec.heads, attention.spec.latent
    both = latent.nope_dim + latent.value_dim
    if attention.q_down is not None:
        add_linear(assigned, attention.q_down, "attention.q_down")
    add_norm(assigned, attention.q_norm, "attention.q_norm")
    add_norm(assigned, attention.kv_norm, "attention.kv_norm")
    add_linear(assigned, attention.kv_down, "attention.kv_down")
    width = latent.nope_dim + latent.rope_dim
    queries = Channels(attention.q.transposed, 0, heads, width, width, heads=True)
    add_channels(assigned, attention.q, "attention.q", queries)
    for path, start, size in (("k_up", 0, latent.nope_dim), ("v_up", latent.nope_dim, latent.value_dim)):
        take = Channels(attention.kv_up.transposed, start, heads, both, size, heads=True)
        add_channels(assigned, attention.kv_up, f"attention.{path}", take)
    add_out(assigned, attention.out, "attention.out", heads)


def _attention_tensors(assigned: Assigned, attention: AttentionFound | LatentFound) -> None:
    if isinstance(attention, LatentFound):
        _latent_tensors(assigned, attention)
        return
    arrangement, flags = attention.spec.arrangement, attention.spec.kind.qk_norm
    add_heads(assigned, attention.q, "attention.q")
    add_heads(assigned, attention.k, "attention.kv", "0")
    values = attention.v
    if values.linear.bias is not None and attention.k.linear.bias is None:
        take = Channels(False, values.starts[0], len(values.starts), values.width, values.width, heads=True)
        add_tensor(assigned, values.linear.bias, "attention.value_bias", take)
        values = dataclasses.replace(values, linear=dataclasses.replace(values.linear, bias=None))
    add_heads(assigned, values, "attention.kv", "1")
    add_out(assigned, attention.out, "attention.out", arrangement.heads)
    for norm, name, heads in (
        (attention.q_norm, "attention.q_norm", arrangement.heads),
        (attention.k_norm, "attention.k_norm", arrangement.kv_heads),
    ):
        own = flags is not None and (flags.all_heads or flags.per_head)
        add_norm(assigned, norm, name, (heads, arrangement.width) if own else None)
    add_norm(assigned, attention.sub_norm, "attention.sub_norm", (arrangement.heads, arrangement.width))
    if attention.gate is not None:
        width = attention.gate.output.shape[1] // arrangement.heads
        take = Channels(attention.gate.transposed, 0, arrangement.heads, width, width, heads=True)
        add_channels(assigned, attention.gate, "attention.gate", take)
    if attention.sinks is not None:
        add_tensor(assigned, attention.sinks, "attention.sinks")


def _mlp_tensors(assigned: Assigned, mlp: MLPFound, path: str) -> None:
    add_linear(assigned, mlp.down, f"{path}.down")
    add_norm(assigned, mlp.sub_norm, f"{path}.sub_norm")
    if mlp.gate is None:
        add_linear(assigned, mlp.up, f"{path}.up")
    elif mlp.layout is None:
        add_linear(assigned, mlp.gate, f"{path}.gate_up", "0")
        add_linear(assigned, mlp.up, f"{path}.gate_up", "1")
    else:
        for part in (0, 1):
            add_channels(assigned, mlp.up, f"{path}.gate_up", _part(mlp, part), str(part))


def _part(mlp: MLPFound, part: int) -> Channels:
    """The gate (0) or up (1) projection within a linear map that holds both."""
    size, which = mlp.down.inputs.shape[1], part ^ mlp.swapped
    if mlp.layout == "halves":
        return Channels(mlp.up.transposed, which * size, 1, size, size)
    return Channels(mlp.up.transposed, which, size, 2, 1)


def places_of(
    trace: Trace, config: DecoderConfig, embedding: EmbeddingFound, layers: Sequence[LayerFound], head: HeadFound
) -> Places:
    """Places of all parameters of the reference."""
    slices: list[Slices] = [{} for _ in layers]
    inside = [layer_tensors(trace, layer, parts) for layer, parts in zip(layers, slices, strict=True)]
    outside = outside_tensors(trace, config, embedding, head)
    assigned = {name for part in (outside, *inside) for name in part}
    return Places(trace.weights, inside, slices, outside, _left_out(trace, assigned))


def _left_out(trace: Trace, assigned: Set[str]) -> dict[str, str]:
    """Parameters of the reference that no part of the decoder needs, each with the reason."""
    import torch

    ran = {call.name for call in trace.calls}
    modules = dict(trace.reference.model.named_modules())
    taken = {trace.weights[name].__array_interface__["data"][0] for name in assigned}
    reasons: dict[str, str] = {}
    for name, weight in trace.weights.items():
        owner, _, short = name.rpartition(".")
        if name in assigned:
            continue
        if not isinstance(getattr(modules.get(owner), short, None), torch.nn.Parameter):
            reasons[name] = "a constant, not a weight"
        elif weight.__array_interface__["data"][0] in taken:
            reasons[name] = "tied to another tensor"
        else:
            unused = "no part of the decoder needs it: logits are right without"
            reasons[name] = unused if owner in ran else "takes no part in reading text"
    return reasons
