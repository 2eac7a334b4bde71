"""The supported model families by the `model_type` of their config.json: one table entry each."""

from __future__ import annotations

from convert.families import (
    cohere,
    delta,
    dots,
    encoder_heritage,
    experts,
    gemma,
    glm,
    gpt,
    granite,
    griffin,
    kimi,
    latent,
    layer_norm,
    lightning,
    llama,
    longcat,
    lstm,
    olmo,
    recurrent,
    rwkv,
    zamba,
)
from convert.families.base import Family
from convert.families.refused import REFUSED

__all__ = ["FAMILIES", "REFUSED", "Family"]

FAMILIES: dict[str, Family] = {
    **llama.FAMILIES,
    **gemma.FAMILIES,
    **olmo.FAMILIES,
    **glm.FAMILIES,
    **granite.FAMILIES,
    **cohere.FAMILIES,
    **layer_norm.FAMILIES,
    **gpt.FAMILIES,
    **experts.FAMILIES,
    **latent.FAMILIES,
    **longcat.FAMILIES,
    **encoder_heritage.FAMILIES,
    **recurrent.FAMILIES,
    **delta.FAMILIES,
    **griffin.FAMILIES,
    **lightning.FAMILIES,
    **kimi.FAMILIES,
    **dots.FAMILIES,
    **lstm.FAMILIES,
    **rwkv.FAMILIES,
    **zamba.FAMILIES,
}
