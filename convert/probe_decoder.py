"""From what a probe found in each layer to one decoder configuration and the place of every parameter."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from convert.probe_attention import AttentionFound
from convert.probe_layer import LayerFound
from convert.probe_mlp import MLPFound
from convert.probe_outside import EmbeddingFound, HeadFound
from convert.probe_rules import (
    Assigned,
    Channels,
    add_channels,
    add_heads,
    add_linear,
    add_norm,
    add_out,
    add_tensor,
)
from convert.probe_trace import Linear, NormCall, Trace
from tide_jax.architecture import DecoderConfig
from tide_jax.errors import TideError

_CONTEXT = r"max_position|n_positions|n_ctx|max_seq|seq_len|context|block_size|max_len|max_target_positions"
_UNKNOWN_CONTEXT = 2048
Flags = dict[str, Any]


def decoder_of(
    trace: Trace, model_type: str, embedding: EmbeddingFound, layers: Sequence[LayerFound], head: HeadFound
) -> DecoderConfig:
    """The configuration all parts together have.

    Raises:
      TideError: layers differ in what a `DecoderConfig` has one flag for.
    """
    flags = _one([_layer_flags(layer) for layer in layers], [f"layer {i}" for i in range(len(layers))])
    kinds = [layer.attention.spec.kind for layer in layers]
    types = tuple(dict.fromkeys(kinds))
    flags |= _norm_flags([norm for norm in _block_norms(embedding, layers, head)])
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


def _one(found: Sequence[Flags], names: Sequence[str]) -> Flags:
    """The flags all have in common. Raises TideError where they differ."""
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


def _attention_flags(attention: AttentionFound) -> Flags:
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


def _mlp_flags(mlp: MLPFound) -> Flags:
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


def _block_norms(embedding: EmbeddingFound, layers: Sequence[LayerFound], head: HeadFound) -> Iterable[NormCall]:
    """Every norm that takes its flags from the decoder."""
    around = [norm for layer in layers for norm in layer.norms.values()]
    inner = [norm for layer in layers for norm in (layer.attention.sub_norm, layer.mlp.sub_norm)]
    return (norm for norm in (*around, *inner, embedding.norm, head.norm) if norm is not None)


def _norm_flags(norms: Sequence[NormCall]) -> Flags:
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
    """Positions a model can read, and whether the checkpoint says so."""
    if embedding.positions is not None:
        return _rows(trace.weights[embedding.positions]) - embedding.offset, True
    named = [int(v) for v in trace.numbers(_CONTEXT) if v >= 1]
    return (named[0], True) if named else (_UNKNOWN_CONTEXT, False)


def outside_tensors(
    trace: Trace, config: DecoderConfig, embedding: EmbeddingFound, head: HeadFound
) -> Assigned:
    """Places of the parameters outside the layers."""
    assigned: Assigned = {}
    add_tensor(assigned, embedding.table, "embed.kernel")
    if embedding.positions is not None:
        shape = config.learned_positions, config.hidden_size
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


def layer_tensors(layer: LayerFound) -> Assigned:
    """Places of a layer's parameters, relative to the layer."""
    assigned: Assigned = {}
    for name, norm in layer.norms.items():
        add_norm(assigned, norm, name)
    _attention_tensors(assigned, layer.attention)
    _mlp_tensors(assigned, layer.mlp)
    return assigned


def _attention_tensors(assigned: Assigned, attention: AttentionFound) -> None:
    arrangement, flags = attention.spec.arrangement, attention.spec.kind.qk_norm
    add_heads(assigned, attention.q, "attention.q")
    add_heads(assigned, attention.k, "attention.kv", "0")
    add_heads(assigned, attention.v, "attention.kv", "1")
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


def _mlp_tensors(assigned: Assigned, mlp: MLPFound) -> None:
    add_linear(assigned, mlp.down, "mlp.down")
    add_norm(assigned, mlp.sub_norm, "mlp.sub_norm")
    if mlp.gate is None:
        add_linear(assigned, mlp.up, "mlp.up")
    elif mlp.layout is None:
        add_linear(assigned, mlp.gate, "mlp.gate_up", "0")
        add_linear(assigned, mlp.up, "mlp.gate_up", "1")
    else:
        for part in (0, 1):
            add_channels(assigned, mlp.up, "mlp.gate_up", _part(mlp, part), str(part))


def _part(mlp: MLPFound, part: int) -> Channels:
    """The gate (0) or up (1) projection in a linear map that holds both."""
    size, which = mlp.down.inputs.shape[1], part ^ mlp.swapped
    if mlp.layout == "halves":
        return Channels(mlp.up.transposed, which * size, 1, size, size)
    return Channels(mlp.up.transposed, which, size, 2, 1)


def left_out(trace: Trace, assigned: Mapping[str, object]) -> dict[str, str]:
    """Parameters of the reference that no part of the decoder needs, each with the reason."""
    import torch

    ran = {call.name for call in trace.calls}
    modules = dict(trace.reference.model.named_modules())
    reasons: dict[str, str] = {}
    for name, weight in trace.weights.items():
        if name in assigned:
            continue
        owner, _, short = name.rpartition(".")
        if not isinstance(getattr(modules.get(owner), short, None), torch.nn.Parameter):
            reasons[name] = "a constant, not a weight"
        elif any(np.shares_memory(weight, trace.weights[other]) for other in assigned):
            reasons[name] = "tied to another tensor"
        elif owner not in ran:
            reasons[name] = "takes no part in reading text"
    return reasons
