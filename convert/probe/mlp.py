"""Finds out what a dense feed-forward block computes, from its linear maps' outputs and the input of `down`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import jax.numpy as jnp
import numpy as np

from convert.probe import axes
from convert.probe.trace import MATCH, Linear, NormCall, Trace, distance, nearly_equal
from tide_jax.model.activations import ACTIVATIONS, SWIGLU_OAI, gated_activation

ACTIVATION_NAMES = tuple({function: name for name, function in reversed(ACTIVATIONS.items())}.values())


@dataclasses.dataclass(frozen=True)
class FoundMLP:
    """A feed-forward block.

    Attributes:
      gate, up, down: linear maps. `gate` is None if there is none, and equals `up` if one map holds both.
      layout: of a map that holds both: "halves" (one after the other) or "pairs" (alternating channels).
      swapped: that map holds `up` first.
      activation, limit: flags of the decoder.
      sub_norm: a norm before `down`.
      error: difference at the input of `down`.
    """

    gate: Linear | None
    up: Linear
    down: Linear
    layout: str | None = None
    swapped: bool = False
    activation: str = "silu"
    limit: float | None = None
    sub_norm: NormCall | None = None
    error: float = np.inf

    @property
    def linears(self) -> tuple[Linear, ...]:
        """Linear maps of the block."""
        return (self.up, self.down) if self.gate is None else (self.gate, self.up, self.down)

    def owns(self, linear: Linear) -> bool:
        """Whether a linear map is part of the block."""
        return linear in self.linears

    @property
    def inputs(self) -> np.ndarray:
        """Input of the block."""
        return self.up.inputs

    @property
    def output(self) -> np.ndarray:
        """Output of the block."""
        return self.down.output

    def gate_and_up(self) -> tuple[np.ndarray | None, np.ndarray]:
        """Outputs of the gate (None if there is none) and of `up`, [T, F]."""
        if self.layout is None:
            return (None if self.gate is None else self.gate.output), self.up.output
        both, size = self.up.output, self.down.inputs.shape[1]
        first, second = (both[:, :size], both[:, size:]) if self.layout == "halves" else (both[:, ::2], both[:, 1::2])
        return (second, first) if self.swapped else (first, second)


def find_mlp(
    trace: Trace, linears: Sequence[Linear], norms: Sequence[NormCall], width: int
) -> tuple[FoundMLP | None, float]:
    """Returns the feed-forward block among a layer's linear maps, or None, and the closest candidate's error.

    Args:
      width: width of the residual stream.
    """
    limits = axes.limits(trace)
    candidates = (
        _measure(shape, activation, limit)
        for shape in _combinations(linears, norms, width)
        for activation in (*ACTIVATION_NAMES, SWIGLU_OAI)
        for limit in limits
        if shape.gate is not None or (limit is None and activation != SWIGLU_OAI)
    )
    best = min(candidates, key=lambda found: found.error, default=None)
    error = np.inf if best is None else best.error
    return (best if error <= MATCH else None), error


def _combinations(linears: Sequence[Linear], norms: Sequence[NormCall], width: int) -> Iterator[FoundMLP]:
    """Combinations of linear maps whose sizes fit together."""
    for last, down in enumerate(linears):
        if down.output.shape[1] != width:
            continue
        sub_norm = next(
            (n for n in norms if n.output.shape == down.inputs.shape and nearly_equal(n.output, down.inputs)), None
        )
        sources = [x for x in linears[:last] if len(x.output) == len(down.output)]
        size = down.inputs.shape[1]
        for up in sources:
            if up.output.shape[1] == 2 * size:
                for layout in ("halves", "pairs"):
                    for swapped in (False, True):
                        yield FoundMLP(up, up, down, layout, swapped, sub_norm=sub_norm)
            if up.output.shape[1] != size:
                continue
            yield FoundMLP(None, up, down, sub_norm=sub_norm)
            for gate in sources:
                if gate is not up and gate.output.shape == up.output.shape and np.array_equal(gate.inputs, up.inputs):
                    yield FoundMLP(gate, up, down, sub_norm=sub_norm)


def _measure(found: FoundMLP, activation: str, limit: float | None) -> FoundMLP:
    """Adds the error to a candidate."""
    gate, up = found.gate_and_up()
    hidden = found.down.inputs if found.sub_norm is None else found.sub_norm.inputs
    if gate is None:
        out = ACTIVATIONS[activation](jnp.asarray(up))
    else:
        out = gated_activation(activation, jnp.asarray(gate), jnp.asarray(up), limit)
    error = distance(np.asarray(out), hidden)
    return dataclasses.replace(found, activation=activation, limit=limit, error=error)
