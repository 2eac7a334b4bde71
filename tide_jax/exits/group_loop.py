"""The loop over layer groups, whoever decides what a group does and when to stop.

Two rules make a group that is not run free (measured; see the README's "How it works"):

* each group is a branch of a `lax.switch` over weights of its own: a dynamic slice out of stacked weights would copy
  them at every step;
* the cache is only read inside the loop. Layers return their new key and value rows, and the caller writes the cache
  once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from tide_jax.model.architecture import DecoderConfig
from tide_jax.model.attention.span import KeyValue

State = TypeVar("State")
Branch = Callable[[State], tuple[State, KeyValue]]
"""What running a group does: the new state, and the group's key and value rows as `GroupRows.stack` gives them."""


class Loop(NamedTuple, Generic[State]):
    """State of the loop.

    Attributes:
      group: the next group, int32 scalar.
      state: whatever the groups pass on.
      rows: key and value rows so far, ``[groups, longest group, B, KV, T, channels]``.
    """

    group: Int[Array, ""]
    state: State
    rows: KeyValue


class GroupRows(NamedTuple):
    """Key and value rows by group, padded to the longest: all branches of a switch return the same shape."""

    groups: tuple[range, ...]

    def empty(self, config: DecoderConfig, x: Float[Array, "B T D"]) -> KeyValue:
        """Zeros for every layer, in the dtype of `x`."""
        heads, key_channels, value_channels = config.cache_shape
        shape = (len(self.groups), self._longest, x.shape[0], heads, x.shape[1])
        return KeyValue(jnp.zeros((*shape, key_channels), x.dtype), jnp.zeros((*shape, value_channels), x.dtype))

    def stack(self, rows: Sequence[KeyValue]) -> KeyValue:
        """The rows of one group's layers as one array."""

        def stack(arrays: list[Array]) -> Array:
            return jnp.stack(arrays + [jnp.zeros_like(arrays[0])] * (self._longest - len(arrays)))

        return KeyValue(stack([r.keys for r in rows]), stack([r.values for r in rows]))

    def by_layer(self, rows: KeyValue) -> KeyValue:
        """``[groups, longest group, ...]`` -> ``[layers, ...]``."""

        def flatten(a: Array) -> Array:
            if all(len(group) == self._longest for group in self.groups):
                return a.reshape(a.shape[0] * a.shape[1], *a.shape[2:])  # without a copy
            return jnp.concatenate([a[g, : len(group)] for g, group in enumerate(self.groups)])

        return KeyValue(flatten(rows.keys), flatten(rows.values))

    def layers_before(self, group: Int[Array, ""]) -> Int[Array, ""]:
        """Layers in the groups before one."""
        return jnp.asarray([0, *(g.stop for g in self.groups)], jnp.int32)[group]

    @property
    def _longest(self) -> int:
        return max(len(group) for group in self.groups)


def behind_zeros(rows: KeyValue, tokens: int) -> KeyValue:
    """A group's rows as those of the last of so many tokens. A CPU writes zeros and a slice faster than it pads."""

    def placed(a: Float[Array, "l B KV T c"]) -> Float[Array, "l B KV Q c"]:
        if a.shape[3] == tokens:
            return a
        empty = jnp.zeros((*a.shape[:3], tokens, a.shape[4]), a.dtype)
        return lax.dynamic_update_slice_in_dim(empty, a, tokens - a.shape[3], axis=3)

    return KeyValue(placed(rows.keys), placed(rows.values))


def next_group(loop: Loop[Any]) -> Int[Array, ""]:
    """For `run_groups`: there is one branch for each group."""
    return loop.group


def run_groups(
    condition: Callable[[Loop[State]], Bool[Array, ""]],
    branches: Sequence[Branch[State]],
    loop: Loop[State],
    *,
    choose: Callable[[Loop[State]], Int[Array, ""]] = next_group,
) -> Loop[State]:
    """Runs group after group while the condition holds.

    Args:
      branches: what `choose` chooses from, by number.
      choose: the branch that runs ``loop.group``; by default there is one for each group.
    """

    def body(s: Loop[State]) -> Loop[State]:
        state, rows = lax.switch(choose(s), branches, s.state)
        zeros = (jnp.int32(0),) * rows.keys.ndim
        keys = lax.dynamic_update_slice(s.rows.keys, rows.keys[None], (s.group, *zeros))
        values = lax.dynamic_update_slice(s.rows.values, rows.values[None], (s.group, *zeros))
        return Loop(s.group + 1, state, KeyValue(keys, values))

    return lax.while_loop(condition, body, loop)
