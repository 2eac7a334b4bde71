"""What a layer keeps of tokens: keys and values, a state, or both side by side."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from jaxtyping import Array, Float

from tide_jax.model.attention.span import CachedRows, KeyValue
from tide_jax.model.recurrent.mixer import State


class SideBySide(NamedTuple):
    """What a layer with attention and a recurrent layer side by side has of each: memory, or rows of new tokens."""

    attention: KeyValue | CachedRows
    recurrent: State | Float[Array, "B T _"]


Memory = KeyValue | State | SideBySide
"""What a layer keeps of all tokens so far."""
Cached = CachedRows | State | SideBySide
"""What a layer reads of a cache."""
Rows = KeyValue | Float[Array, "B T _"] | SideBySide
"""What a layer keeps of new tokens: keys and values, inputs to its state, or both."""

New = Rows | State | SideBySide
"""What a cache takes in of a pass: rows, or states that have taken in the tokens already."""


def by_part(first: Any, *others: Any, slots: Callable[..., Any], state: Callable[..., Any]) -> Any:
    """Calls `slots` with a layer's keys and values, and `state` with its state; a layer may have both.

    Args:
      first: the layer's memory.
      others: more arguments with the same parts.
    """
    if isinstance(first, SideBySide):
        attention, recurrent = zip(first, *others, strict=True)
        return SideBySide(slots(*attention), state(*recurrent))
    return state(first, *others) if isinstance(first, State) else slots(first, *others)


def parts_of(rows: Rows) -> tuple[Any, ...]:
    """The parts of a layer's rows: one, or attention's and the recurrent layer's."""
    return tuple(rows) if isinstance(rows, SideBySide) else (rows,)


def joined(parts: tuple[Any, ...]) -> Rows:
    """Inverse of `parts_of`."""
    return parts[0] if len(parts) == 1 else SideBySide(*parts)
