"""Checks the counts in a config.json against bounds before anything of that length is allocated."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from tide_jax.errors import TideError, shorten
from tide_jax.ranges import MOST_CHANNELS, MOST_EXPERTS, MOST_HEADS, MOST_LAYERS, MOST_POSITIONS, MOST_TOKENS

_BOUNDS: tuple[tuple[int, int, str], ...] = (
    (1, MOST_LAYERS, "num_hidden_layers n_layer n_layers num_layers decoder_layers"),
    (1, MOST_TOKENS, "vocab_size"),
    (1, MOST_HEADS, "num_attention_heads num_key_value_heads n_head n_heads decoder_attention_heads"),
    (1, MOST_CHANNELS, "hidden_size head_dim intermediate_size n_embd n_inner d_model ffn_dim decoder_ffn_dim dff"),
    (1, MOST_POSITIONS, "max_position_embeddings n_positions max_seq_len"),
    (0, MOST_EXPERTS, "num_experts num_local_experts n_routed_experts moe_num_experts num_experts_per_tok moe_topk"),
    (1, MOST_LAYERS, "attn_layer_period expert_layer_period"),
    # transformers divides by these, or compares their product, before this package reads them
    (1, MOST_HEADS, "num_heads mamba_n_heads n_mamba_heads"),
    (1, MOST_CHANNELS, "mamba_d_head mamba_d_ssm expand mamba_expand"),
    (0, 2**16, "num_labels"),  # transformers builds a table of this length
)
_BOUNDS_BY_NAME = {name: (low, high) for low, high, names in _BOUNDS for name in names.split()}
_LAYER_COUNT = re.compile(r"(.*_)?layers?|depth")


def check_sizes(values: Mapping[str, Any]) -> None:
    """Checks the counts in a config.json and its parts. Keys that are no counts, and values that are no integers, pass.

    Raises:
      TideError: a count is outside its bounds.
    """
    for name, value in _integers(values):
        low, high = _BOUNDS_BY_NAME.get(name, (None, MOST_LAYERS if _LAYER_COUNT.fullmatch(name) else None))
        if high is not None and value > high:
            raise TideError(f"config.json has {name}={shorten(value)}, expected {high} or less; correct it")
        # Check lower bounds at the top level only: a nested part that is left out may lack what a decoder needs.
        if low is not None and value < low and values.get(name) == value:
            raise TideError(f"config.json has {name}={shorten(value)}, expected {low} or more; correct it")


def _integers(values: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """Yields each integer with its key, at any depth."""
    waiting: list[Mapping[str, Any]] = [values]
    while waiting:
        for name, value in waiting.pop().items():
            if isinstance(value, Mapping):
                waiting.append(value)
            elif isinstance(value, int) and not isinstance(value, bool):
                yield name, value
