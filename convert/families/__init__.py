"""The supported model families, by the `model_type` of their config.json. A family is one table entry."""

from __future__ import annotations

from convert.families import encoder_heritage, experts, gemma, gpt, latent, llama
from convert.families.base import Family
from convert.families.refused import REFUSED

__all__ = ["FAMILIES", "REFUSED", "Family"]

FAMILIES: dict[str, Family] = {
    **llama.FAMILIES,
    **gemma.FAMILIES,
    **gpt.FAMILIES,
    **experts.FAMILIES,
    **latent.FAMILIES,
    **encoder_heritage.FAMILIES,
}
