"""Decoders in the dress of an encoder: the causal halves of BART and its relatives, BERT and its relatives."""

from __future__ import annotations

from convert.families.base import Family

FAMILIES: dict[str, Family] = {}
