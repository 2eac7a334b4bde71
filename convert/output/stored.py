"""A plan in the layout the model keeps its parameters in, so that a converted file can be mapped as it is.

Weight maps name the axes of a kernel as ``inputs + outputs``; a model keeps `Dense` kernels as ``outputs + inputs``
(`tide_jax.model.ops.Dense`). Files hold what the model keeps: loading one turns nothing around and copies nothing.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from convert.weights.rules import Piece, Plan, Slot, Take
from tide_jax.model.architecture import DecoderConfig
from tide_jax.model.decoder import kernel_input_axes
from tide_jax.model.ops import stored_order


@dataclasses.dataclass(frozen=True)
class _Turned:
    """A take whose result has its axes in another order."""

    take: Take
    order: tuple[int, ...]

    def __call__(self, array: np.ndarray, config: DecoderConfig) -> np.ndarray:
        return self.take(array, config).transpose(self.order)


def as_stored(plan: Plan, config: DecoderConfig) -> Plan:
    """The same plan for parameters as the model keeps them."""
    inputs = kernel_input_axes(config)
    orders = {path: stored_order(len(plan.shapes[path]), axes) for path, axes in inputs.items()}
    shapes = {
        path: tuple(shape[axis] for axis in orders[path]) if path in orders else shape
        for path, shape in plan.shapes.items()
    }
    pieces = tuple(_turned(p, orders[p.path]) if p.path in orders else p for p in plan.pieces)
    return dataclasses.replace(plan, shapes=shapes, pieces=pieces)


def _turned(piece: Piece, order: tuple[int, ...]) -> Piece:
    slot: Slot = piece.slot + (slice(None),) * (len(order) - len(piece.slot))
    kept = [axis for axis, index in enumerate(slot) if isinstance(index, slice)]  # the axes that a take has
    axes = tuple(kept.index(axis) for axis in order if axis in kept)
    turned = tuple(slot[axis] for axis in order)
    return dataclasses.replace(piece, slot=turned, take=_Turned(piece.take, axes))
