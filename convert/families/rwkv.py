"""RWKV-4, whose attention is a weighted mean and whose two sublayers read the token before (arXiv:2305.13048)."""

from __future__ import annotations

from typing import Any

from convert.families.base import Family, require
from convert.families.numbers import count
from convert.families.recurrent import without_attention
from convert.weights import takes
from convert.weights.parts import (
    Names,
    embedding_norm_rules,
    layer_rules,
    linear,
    norm,
    outer_rules,
)
from convert.weights.rules import Target
from tide_jax.model.architecture import DecoderConfig
from tide_jax.model.recurrent.types import TimeMixType


def _rwkv(hf: Any) -> DecoderConfig:
    """The model as trained: `rescale_every`, which keeps float16 in range, is not imitated."""
    require(hf, layer_norm_epsilon=1e-5)  # the last norm's, whatever the configuration says
    return without_attention(
        hf,
        TimeMixType(inner=count(hf, "attention_hidden_size"), mixes_mlp=True),
        intermediate_size=hf.intermediate_size,
        mlp_layers=None,
        mlp_gated=False,
        activation="relu2",
        norm="layer",
        norm_bias=True,
        embedding_norm=True,
    )


def _shares(name: str, path: str, *parts: str) -> Names:
    """Shares of the token itself, beside the token before."""
    return {
        f"{name}.time_mix_{part}": (Target(f"{path}.shares", takes.flatten, str(i)),) for i, part in enumerate(parts)
    }


RWKV = (
    *outer_rules("[rwkv.]embeddings", "[rwkv.]ln_out", "head"),
    *embedding_norm_rules("[rwkv.]blocks.0.pre_ln"),
    *layer_rules(
        "[rwkv.]blocks",
        norm("ln1", "pre_attention_norm"),
        _shares("attention", "recurrent", "key", "value", "receptance"),
        {"attention.time_decay": (Target("recurrent.fade"),), "attention.time_first": (Target("recurrent.bonus"),)},
        linear("attention.key", "recurrent.k"),
        linear("attention.value", "recurrent.v"),
        linear("attention.receptance", "recurrent.gate"),
        linear("attention.output", "recurrent.out"),
        norm("ln2", "pre_mlp_norm"),
        _shares("feed_forward", "mlp", "key", "receptance"),
        linear("feed_forward.key", "mlp.block.up"),
        linear("feed_forward.value", "mlp.block.down"),
        linear("feed_forward.receptance", "mlp.gate"),
    ),
)
# transformers halves the residual stream every few layers, because float16 does not hold that of published models. Here
# the stream is as trained, so it needs bfloat16.
FAMILIES: dict[str, Family] = {"rwkv": Family(_rwkv, RWKV, overflows_float16=True)}
