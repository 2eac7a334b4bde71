"""Adds the field names of transformers 4 to a config.json, so that versions 4 and 5 load the same model.

transformers 5 keeps rotary settings in `rope_parameters`. transformers 4 does not read that field: it reads
`rope_theta`, `rope_scaling`, and a rotated share whose name differs between models. transformers 5 reads the older
names too, so both sets of names must agree.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

logger = logging.getLogger(__name__)

_ROTARY_BASE_NAMES = {"gpt_neox": "rotary_emb_base", "gpt_neox_japanese": "rotary_emb_base"}
_NESTED_ROTARY_BASE_NAMES = {
    "gemma3_text": ("rope_theta", "rope_local_base_freq"),
    "gemma3n_text": ("rope_theta", "rope_local_base_freq"),
    "modernbert-decoder": ("global_rope_theta", "local_rope_theta"),
    "olmo3": ("rope_theta", None),
}
"""transformers 4's names of the rotary base for full attention and for sliding windows, where layers differ in it.
Other models with settings per layer type exist only in transformers 5, where `rope_scaling` means something else."""
_ROTATED_SHARE_NAMES = {"gpt_neox": "rotary_pct", "gpt_neox_japanese": "rotary_pct"}
_THREE_FIELD_TYPES = ("phi3", "phi4_multimodal")
"""Models whose transformers 4 class accepts only a type and two lists of factors in `rope_scaling`."""
_SEPARATE_FIELDS = ("rope_theta", "partial_rotary_factor")
_UNSCALED = (None, "default")


def add_older_names(config: Mapping[str, Any]) -> dict[str, Any]:
    """Adds the older name of every setting that has one, also in nested parts. Existing keys keep their values."""
    parts = {key: add_older_names(value) for key, value in config.items() if _is_config_part(value)}
    named = {**config, **parts}
    dtype = config.get("dtype") or config.get("torch_dtype")
    if dtype:
        named |= {"dtype": dtype, "torch_dtype": dtype}
    rope = config.get("rope_parameters")
    if not isinstance(rope, Mapping) or not rope:
        return named
    return _older_rotary_settings(str(config.get("model_type")), rope) | named


def _is_config_part(value: Any) -> bool:
    return isinstance(value, dict) and "model_type" in value


def _older_rotary_settings(model_type: str, rope: Mapping[str, Any]) -> dict[str, Any]:
    """Older names of rotary settings. `rope` is flat, or nested by layer type."""
    full, local = rope, dict[str, Any]()
    names = _ROTARY_BASE_NAMES.get(model_type, "rope_theta"), None
    if any(isinstance(value, Mapping) for value in rope.values()):
        if model_type not in _NESTED_ROTARY_BASE_NAMES:
            return {}
        full, local = rope.get("full_attention") or {}, rope.get("sliding_attention") or {}
        names = _NESTED_ROTARY_BASE_NAMES[model_type]
    share = _ROTATED_SHARE_NAMES.get(model_type, "partial_rotary_factor"), full.get("partial_rotary_factor")
    named_values = (names[0], full.get("rope_theta")), (names[1], local.get("rope_theta")), share
    bases = {name: value for name, value in named_values if name and value is not None}
    return bases | _older_scaling_settings(model_type, full)


def _older_scaling_settings(model_type: str, rope: Mapping[str, Any]) -> dict[str, Any]:
    kind = rope.get("rope_type", rope.get("type"))
    if kind in _UNSCALED:
        return {"rope_scaling": None}
    scaling = {key: value for key, value in rope.items() if key not in _SEPARATE_FIELDS}
    original = {name: scaling[name] for name in ("original_max_position_embeddings",) if name in scaling}
    if model_type not in _THREE_FIELD_TYPES:
        return {"rope_scaling": scaling} | (original if kind == "longrope" else {})
    unreadable = set(scaling) - {"rope_type", "type", "short_factor", "long_factor", "original_max_position_embeddings"}
    if unreadable:  # transformers 5 would read the older name and lose these settings
        logger.warning(
            "transformers 4 can't read %s of %s: load the checkpoint with transformers 5",
            ", ".join(sorted(unreadable)),
            model_type,
        )
        return {}
    factors = {name: scaling[name] for name in ("short_factor", "long_factor") if name in scaling}
    return {"rope_scaling": {"type": kind} | factors} | original
