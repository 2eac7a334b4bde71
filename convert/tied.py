"""Decides whether the head is tied to the embedding, and which of the two tensors is stored."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Sequence

import numpy as np

from convert.sources.base import Source
from convert.weights.rules import Rule
from tide_jax.model.architecture import DecoderConfig

_EMBEDDING, _HEAD = "embed.kernel", "head.kernel"


def resolve_tied_head(source: Source, config: DecoderConfig, rules: Sequence[Rule]) -> DecoderConfig:
    """Unties the configuration if the stored head differs from the embedding, as transformers does."""
    if not config.tie_embeddings or not (heads := _tensors_filling(source, rules, _HEAD)):
        return config
    embeddings = _tensors_filling(source, rules, _EMBEDDING)
    if not embeddings or _digests(source, heads) == _digests(source, embeddings):
        return config
    return dataclasses.replace(config, tie_embeddings=False)


def rules_for(source: Source, config: DecoderConfig, rules: tuple[Rule, ...]) -> tuple[Rule, ...]:
    """Weight map for the stored tensors. A tied head that is stored alone fills the embedding, as in transformers."""
    heads = _tensors_filling(source, rules, _HEAD)
    if not config.tie_embeddings or not heads or _tensors_filling(source, rules, _EMBEDDING):
        return rules
    targets = next(rule.targets for rule in rules if _fills(rule, _EMBEDDING))
    others = tuple(rule for rule in rules if not any(re.fullmatch(rule.pattern, head) for head in heads))
    return (*others, *(Rule(re.escape(head), targets) for head in heads))


def _fills(rule: Rule, path: str) -> bool:
    return any(target.path == path for target in rule.targets)


def _tensors_filling(source: Source, rules: Sequence[Rule], path: str) -> list[str]:
    """Source tensors that fill the parameter `path` in the untied weight map."""
    patterns = [rule.pattern for rule in rules if _fills(rule, path)]
    return [name for name in source.tensors if any(re.fullmatch(pattern, name) for pattern in patterns)]


def _digests(source: Source, names: Sequence[str]) -> set[bytes]:
    return {hashlib.sha256(source.read(name).reshape(-1).view(np.uint8).data).digest() for name in names}
