"""config.json in the words of transformers 4 beside those of transformers 5, so that both load the same model.

transformers 5 keeps a rotary embedding's settings in `rope_parameters`, which transformers 4 does not read: it takes
`rope_theta`, `rope_scaling` and, for what is rotated, names that differ between models. transformers 5 reads the older
names as well, so both have to say the same.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

logger = logging.getLogger(__name__)

_THETA = {"gpt_neox": "rotary_emb_base", "gpt_neox_japanese": "rotary_emb_base"}
_NESTED = {
    "gemma3_text": ("rope_theta", "rope_local_base_freq"),
    "gemma3n_text": ("rope_theta", "rope_local_base_freq"),
    "modernbert-decoder": ("global_rope_theta", "local_rope_theta"),
    "olmo3": ("rope_theta", None),
}
"""Models of transformers 4 whose layers differ in their base: its name for full attention and for sliding windows. In
others that have settings by kind of layer, which are of transformers 5, `rope_scaling` would say something else."""
_SHARE = {"gpt_neox": "rotary_pct", "gpt_neox_japanese": "rotary_pct"}
_THREE_FIELDS = ("phi3", "phi4_multimodal")
"""Models whose older class takes a `rope_scaling` of a type and two lists of factors, and nothing else."""
_OWN_FIELDS = ("rope_theta", "partial_rotary_factor")
_PLAIN = (None, "default")


def with_older_names(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json, parts included, with the older name of every setting that has one; what it has stays as it is."""
    parts = {key: with_older_names(value) for key, value in config.items() if _is_part(value)}
    named = {**config, **parts}
    dtype = config.get("dtype") or config.get("torch_dtype")
    if dtype:
        named |= {"dtype": dtype, "torch_dtype": dtype}
    rope = config.get("rope_parameters")
    if not isinstance(rope, Mapping) or not rope:
        return named
    return _rotary(str(config.get("model_type")), rope) | named


def _is_part(value: Any) -> bool:
    return isinstance(value, dict) and "model_type" in value


def _rotary(model_type: str, rope: Mapping[str, Any]) -> dict[str, Any]:
    """The older names of rotary settings, which are flat or those of each kind of layer."""
    full, local = rope, dict[str, Any]()
    names = _THETA.get(model_type, "rope_theta"), None
    if any(isinstance(value, Mapping) for value in rope.values()):
        if model_type not in _NESTED:
            return {}
        full, local = rope.get("full_attention") or {}, rope.get("sliding_attention") or {}
        names = _NESTED[model_type]
    share = _SHARE.get(model_type, "partial_rotary_factor"), full.get("partial_rotary_factor")
    found = (names[0], full.get("rope_theta")), (names[1], local.get("rope_theta")), share
    return {name: value for name, value in found if name and value is not None} | _scaling(model_type, full)


def _scaling(model_type: str, rope: Mapping[str, Any]) -> dict[str, Any]:
    kind = rope.get("rope_type", rope.get("type"))
    if kind in _PLAIN:
        return {"rope_scaling": None}
    scaling = {key: value for key, value in rope.items() if key not in _OWN_FIELDS}
    original = {name: scaling[name] for name in ("original_max_position_embeddings",) if name in scaling}
    if model_type not in _THREE_FIELDS:
        return {"rope_scaling": scaling} | (original if kind == "longrope" else {})
    extra = set(scaling) - {"rope_type", "type", "short_factor", "long_factor", "original_max_position_embeddings"}
    if extra:  # transformers 5 would read the older name and miss them
        logger.warning(
            "transformers 4 can't read %s of %s; it needs transformers 5", ", ".join(sorted(extra)), model_type
        )
        return {}
    factors = {name: scaling[name] for name in ("short_factor", "long_factor") if name in scaling}
    return {"rope_scaling": {"type": kind} | factors} | original
