"""Arrangements of recurrent layers' tensors; see `convert.weights.takes`."""

from __future__ import annotations

from typing import TypeVar

import numpy as np

from convert.weights.rules import Take
from tide_jax.errors import TideError
from tide_jax.model.architecture import DecoderConfig
from tide_jax.model.recurrent.types import (
    GatedDeltaType,
    LightningType,
    MatrixLSTMType,
    RecurrentType,
    StateSpaceType,
)

Kind = TypeVar("Kind", bound=RecurrentType)


def _only(c: DecoderConfig, kind: type[Kind]) -> Kind:
    """The configuration's recurrent type of a kind; layers of one kind have the same sizes in all families."""
    found = next((each for each in c.recurrent_types if isinstance(each, kind)), None)
    if found is None:
        raise TideError(f"the configuration has no recurrent layers of kind {kind.__name__}")
    return found


def filters(a: np.ndarray, c: DecoderConfig) -> np.ndarray:
    """Filters of a convolution by channel, [C, 1, K] to [C, K]."""
    return a[:, 0]


def thirds(a: np.ndarray, c: DecoderConfig) -> np.ndarray:
    """Three projections, one after the other: [3 N, D] to [D, 3, N], [3 N] to [3, N]."""
    return a.T.reshape(*a.shape[1:], 3, -1)


def alternating(a: np.ndarray, c: DecoderConfig) -> np.ndarray:
    """Two projections whose outputs alternate: [2 N, D] to [D, 2, N], [2 N] to [2, N]."""
    return a.T.reshape(*a.shape[1:], -1, 2).swapaxes(-1, -2)


def joined_heads(a: np.ndarray, c: DecoderConfig) -> np.ndarray:
    """Channels by head to channels, [H, N, ...] to [H N, ...]."""
    return a.reshape(-1, *a.shape[2:])


def state_space_part(number: int) -> Take:
    """Gate, stream or time step of Mamba-2's input projection [inner + (inner + 2 G S) + H, ...]."""

    def take(a: np.ndarray, c: DecoderConfig) -> np.ndarray:
        kind = _only(c, StateSpaceType)
        inner = kind.heads * kind.head_dim
        ends = [0, inner, inner + kind.sizes(c.hidden_size).channels, a.shape[0]]
        return a[ends[number] : ends[number + 1]].T

    return take


def group_norm(a: np.ndarray, c: DecoderConfig) -> np.ndarray:
    """Scale of the norm over groups, [inner] to [groups, inner / groups]."""
    return a.reshape(_only(c, StateSpaceType).groups, -1)


def by_head(kind: type[RecurrentType], heads: str = "heads") -> Take:
    """What has channels of heads as its outputs, [H * c, ...] to [..., H, c]; `heads` is the type's field."""
    return lambda a, c: a.T.reshape(*a.shape[1:], getattr(_only(c, kind), heads), -1)


def by_head_in(kind: type[RecurrentType]) -> Take:
    """Output projection over channels of heads, [D, H * c] to [H, c, D]."""
    return lambda a, c: a.T.reshape(_only(c, kind).heads, -1, a.shape[0])  # type: ignore[union-attr]


delta_keys, delta_values = (by_head(GatedDeltaType, heads) for heads in ("key_heads", "value_heads"))


def _delta_channels(c: DecoderConfig, number: int) -> slice:
    """Channels of queries, keys or values, where these lie one after the other."""
    kind = _only(c, GatedDeltaType)
    ends = np.cumsum([0, *(kind.key_heads * kind.key_dim,) * 2, kind.value_heads * kind.value_dim])
    return slice(ends[number], ends[number + 1])


def delta_part(number: int) -> Take:
    """Queries, keys or values of one Linear [2 h dk + H dv, D]: [D, heads, channels]."""
    take = delta_values if number == 2 else delta_keys
    return lambda a, c: take(a[_delta_channels(c, number)], c)


def delta_filters(number: int) -> Take:
    """Filters of queries, keys or values, from one convolution [2 h dk + H dv, 1, K]: [channels, K]."""
    return lambda a, c: a[_delta_channels(c, number), 0]


def delta_part_by_head(number: int) -> Take:
    """The same, or the gate (3), from a Linear that has each key head's query, key, values and gates together."""

    def take(a: np.ndarray, c: DecoderConfig) -> np.ndarray:
        kind = _only(c, GatedDeltaType)
        values = kind.value_heads // kind.key_heads * kind.value_dim
        by_head = a.T.reshape(a.shape[1], kind.key_heads, -1)
        ends = np.cumsum([0, kind.key_dim, kind.key_dim, values, values])
        part = by_head[..., ends[number] : ends[number + 1]]
        return part if number < 2 else part.reshape(a.shape[1], kind.value_heads, -1)

    return take


def delta_gate_by_head(number: int) -> Take:
    """Rate (0) or fade (1) of a Linear that has those of each key head together: [D, H]."""

    def take(a: np.ndarray, c: DecoderConfig) -> np.ndarray:
        by_head = a.T.reshape(a.shape[1], _only(c, GatedDeltaType).key_heads, 2, -1)
        return by_head[:, :, number].reshape(a.shape[1], -1)

    return take


def lstm_part(number: int) -> Take:
    """Queries, keys, values or output gate of one Linear [2 H dk + 2 H dv, D]: [D, H, channels]."""

    def take(a: np.ndarray, c: DecoderConfig) -> np.ndarray:
        kind = _only(c, MatrixLSTMType)
        keys, values = kind.heads * kind.key_dim, kind.heads * kind.value_dim
        ends = np.cumsum([0, keys, keys, values, values])
        return by_head(MatrixLSTMType)(a[ends[number] : ends[number + 1]], c)

    return take


def gated_queries(number: int) -> Take:
    """Queries (0) or their gate (1) of a Linear that has both of each head together: [..., H, hd]."""

    def take(a: np.ndarray, c: DecoderConfig) -> np.ndarray:
        return a.T.reshape(*a.shape[1:], c.num_heads, 2, -1)[..., number, :]

    return take


def lightning_qkv(a: np.ndarray, c: DecoderConfig) -> np.ndarray:
    """Queries, keys and values of lightning attention, head by head: [H * 3 * hd, D] to [D, H, 3, hd]."""
    kind = _only(c, LightningType)
    return a.T.reshape(a.shape[1], kind.heads, 3, kind.head_dim)
