"""Families with multi-head latent attention."""

from __future__ import annotations

from convert.families.base import Family

FAMILIES: dict[str, Family] = {}
