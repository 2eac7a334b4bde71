"""What all recurrent layers share: inputs of tokens, which a state takes in one after the other.

A mixer never changes a state that it reads. It returns the tokens' inputs, and the caller that runs the layers lets the
state take in those of the tokens that count (`Mixer.advance`). So a skipped layer only needs its inputs, a queue can
wait, and rejected drafts leave nothing behind.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from tide_jax.model.recurrent.conv import causal_conv, move_window
from tide_jax.model.recurrent.linear import run_linear
from tide_jax.model.recurrent.order import TokenOrder
from tide_jax.model.recurrent.types import StateSizes


class State(NamedTuple):
    """A recurrent layer's memory of the tokens so far.

    Attributes:
      window: inputs of the newest tokens, for the convolution; empty without one.
      matrix: what each head's keys read, float32; without channels for layers that only convolve.
    """

    window: Float[Array, "B W C"]
    matrix: Float[Array, "B H dk dv"]


def empty_state(sizes: StateSizes, batch: int, dtype: DTypeLike) -> State:
    """The state before the first token."""
    window = jnp.zeros((batch, sizes.width - 1, sizes.channels), dtype)
    return State(window, jnp.zeros((batch, *sizes.matrix), jnp.float32))


class Mixer(nnx.Module):
    """A recurrent layer. Subclasses set the attributes and implement `_project`, `_updates` and `_output`.

    Attributes:
      sizes: of its state.
      filters, filter_bias: the convolution, ``[C, K]`` and ``[C]``, if there is one; subclasses whose filters lie
        apart join them in `_all_filters`.
      delta: whether writes follow the delta rule, in linear recurrences.
    """

    sizes: StateSizes
    filters: nnx.Param
    filter_bias: nnx.Param | None
    delta: bool = False

    def start(self, batch: int, dtype: DTypeLike) -> State:
        """The state before the first token."""
        return empty_state(self.sizes, batch, dtype)

    def project_inputs(self, x: Float[Array, "B T D"]) -> Float[Array, "B T I"]:
        """The tokens' inputs to the state, without running the layer."""
        return self._project(x)[0]

    def __call__(
        self, x: Float[Array, "B T D"], order: TokenOrder, state: State | None, *, advances: bool = False
    ) -> tuple[Float[Array, "B T D"], Float[Array, "B T I"] | State]:
        """The layer's output for new tokens, and their inputs to the state.

        Args:
          order: of the real tokens; other slots get meaningless outputs.
          state: of the tokens before, None if there are none.
          advances: return the state after the real tokens instead of the inputs, for callers that know that all real
            tokens count. It costs nothing here, and `advance` computes all updates again.
        """
        state = self.start(x.shape[0], x.dtype) if state is None else state
        inputs, gate = self._project(x)
        ordered = order.forth(inputs)
        mixed, updates = self._updates(ordered, state.window)
        read, matrix = None, state.matrix
        if updates is not None:
            read, matrix = self._run(state.matrix, updates.only(order.real))
            read = order.back(read)
        y = self._output(read, order.back(mixed), gate)
        return y, State(self._move_window(state, ordered, order), matrix) if advances else inputs

    def advance(self, state: State, inputs: Float[Array, "B T I"], order: TokenOrder) -> State:
        """The state after it took in the real tokens' inputs."""
        ordered = order.forth(inputs)
        _, updates = self._updates(ordered, state.window)
        window = self._move_window(state, ordered, order)
        if updates is None:
            return State(window, state.matrix)
        return State(window, self._run(state.matrix, updates.only(order.real))[1])

    def _move_window(self, state: State, ordered: Float[Array, "B T I"], order: TokenOrder) -> Float[Array, "B W C"]:
        return move_window(state.window, ordered[..., : self.sizes.channels], order.count)

    def _convolve(self, rows: Float[Array, "B T C"], window: Float[Array, "B W C"]) -> Float[Array, "B T C"]:
        bias = None if self.filter_bias is None else self.filter_bias[...]
        return causal_conv(window, rows, self._all_filters(), bias)

    def _all_filters(self) -> Float[Array, "C K"]:
        return self.filters[...]

    def _project(self, x: Float[Array, "B T D"]) -> tuple[Float[Array, "B T I"], Float[Array, "B T ..."]]:
        """Inputs to the state, the convolution's channels first, and the gate of the output."""
        raise NotImplementedError

    def _updates(self, inputs: Array, window: Array) -> tuple[Array, Any]:
        """Convolved channels, and what ordered inputs do to the matrix; None without a matrix."""
        raise NotImplementedError

    def _run(self, matrix: Array, updates: Any) -> tuple[Array, Array]:
        """What each token reads, ``[B, T, H, dv]``, and the matrix after the last token."""
        return run_linear(matrix, updates, delta=self.delta)

    def _output(self, read: Array | None, mixed: Array, gate: Array) -> Float[Array, "B T D"]:
        """The layer's output from what the queries read, the convolved channels, and the gate."""
        raise NotImplementedError
