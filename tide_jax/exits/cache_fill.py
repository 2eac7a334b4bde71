"""What skipped layers keep of a token, projected from an estimate of the layer's input."""

from __future__ import annotations

import functools
import logging

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from pallas_kernels.common import NormSettings, NormWeights
from pallas_kernels.kv_fill import IMPLEMENTATIONS, KVRows, KVWeights, Rotary, Settings, kv_fill
from tide_jax.model.attention.grouped import Attention, AttentionContext
from tide_jax.model.attention.span import KeyValue
from tide_jax.model.layers import Context, DecoderLayer
from tide_jax.model.memory import Rows
from tide_jax.model.norms import GatedNorm, Norm
from tide_jax.model.sharding import on_mesh

logger = logging.getLogger(__name__)


def fill_rows(
    layer: DecoderLayer,
    x: Float[Array, "B T D"],
    contexts: tuple[Context, ...],
    fill: Bool[Array, "B T"],
    *,
    implementation: str | None = None,
) -> Rows:
    """What `layer` would keep of tokens, without running the layer.

    The result is that of `DecoderLayer.project_rows`, computed by the `kv_fill` kernel where it applies.

    Args:
      layer: the skipped layer.
      x: the layer's input.
      contexts: of the layers, with the tokens' true positions.
      fill: tokens whose rows are needed; rows of other tokens are undefined.
      implementation: of the cache fill, see `pallas_kernels`. On a mesh, and for layers the kernel doesn't support,
        rows are projected in plain JAX. For unsupported layers this logs a warning if an implementation was named.
    """
    attention, context, norm = layer.attention, contexts[layer.layer_type], layer.pre_attention_norm
    wanted = IMPLEMENTATIONS.own(implementation)
    # `project_rows` is fast on a CPU, and on a mesh it splits its products over the devices.
    if IMPLEMENTATIONS.plain(wanted, fill.size) or on_mesh():
        return layer.project_rows(x, contexts)
    if (
        (reason := unsupported(layer)) is not None
        or not isinstance(attention, Attention)
        or isinstance(norm, GatedNorm)
    ):
        if wanted is not None:
            _warn_once(f"kv_fill: {reason}; layers of this kind project their rows in plain JAX")
        return layer.project_rows(x, contexts)
    assert isinstance(context, AttentionContext)
    heads, _, channels = attention.kv.outputs
    empty = jnp.zeros((x.shape[0], heads, x.shape[1], channels), x.dtype)
    gain = None if attention.k_norm is None else attention.k_norm.scale
    bias = attention.kv.bias
    weights = KVWeights(
        _norm_weights(norm),
        attention.kv.weights(x.dtype),
        None if bias is None else bias[...],
        None if gain is None else gain[...],
    )
    rotary = None if context.cos is None or context.sin is None else Rotary(context.cos, context.sin)
    rows = kv_fill(
        x,
        weights,
        rotary,
        fill,
        KVRows(empty, empty),
        settings=_settings(attention, norm),
        implementation=wanted,
    )
    return KeyValue(*rows)


def unsupported(layer: DecoderLayer) -> str | None:
    """Why the `kv_fill` kernel can't project the rows of a layer; None if it can."""
    attention = layer.attention
    if not isinstance(attention, Attention) or type(attention).place_kv is not Attention.place_kv:
        return f"{type(attention or layer.recurrent).__name__} stores other rows than keys and values of its heads"
    norm = attention.k_norm
    plain_norm = norm is None or (norm.kind == "rms" and norm.scale is not None and norm.scale.ndim == 1)
    reasons = {
        "a recurrent layer runs beside its attention": layer.recurrent is not None,
        "the residual stream carries more than itself": layer.carried != "nothing",
        "the norm before it has a gate": isinstance(layer.pre_attention_norm, GatedNorm),
        "values are not projected beside keys": attention.value is not None or attention.kv.outputs[1] != 2,
        "its weights are 8-bit integers, which would become floats in memory": attention.kv.scale is not None,
        "values have a bias and keys have none": attention.value_bias is not None,
        "values are normed, scaled or rotated": (
            attention.value_norm is not None or attention.value_scale != 1.0 or attention.rotates_values
        ),
        "keys and values are clipped": attention.clip is not None,
        "keys have a norm of another kind than RMSNorm over a head, before the rotation": (
            not plain_norm or (norm is not None and (attention.norm_after_rope or norm.bias is not None))
        ),
    }
    return next((reason for reason, found in reasons.items() if found), None)


def _norm_weights(norm: Norm | None) -> NormWeights:
    if norm is None:
        return NormWeights()
    return NormWeights(*(None if parameter is None else parameter[...] for parameter in (norm.scale, norm.bias)))


def _settings(attention: Attention, norm: Norm | None) -> Settings:
    key_norm = attention.k_norm
    before = NormSettings(0.0, "none")
    if norm is not None:
        before = NormSettings(norm.eps, "layer" if norm.kind == "layer" else "rms", norm.unit_offset)
    return Settings(
        before,
        key_eps=0.0 if key_norm is None else key_norm.eps,
        key_unit_offset=key_norm is not None and key_norm.unit_offset,
        interleaved=attention.interleaved,
    )


@functools.cache
def _warn_once(reason: str) -> None:
    logger.warning("%s", reason)
