"""Rearranges a plan into the model's parameter layout, so that converted files can be memory-mapped directly.

Weight maps order the axes of a kernel as ``inputs + outputs``; a model stores `Dense` kernels as ``outputs + inputs``
(`tide_jax.model.ops.Dense`). Files have the model's layout, so that loading neither transposes nor copies.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from convert.weights.rules import Piece, Plan, Slot, Take
from tide_jax.model.architecture import DecoderConfig
from tide_jax.model.decoder import kernel_input_axes
from tide_jax.model.ops import storage_order


@dataclasses.dataclass(frozen=True)
class _TransposedTake:
    """A take followed by a transposition."""

    take: Take
    order: tuple[int, ...]

    def __call__(self, array: np.ndarray, config: DecoderConfig) -> np.ndarray:
        return self.take(array, config).transpose(self.order)


def to_model_layout(plan: Plan, config: DecoderConfig) -> Plan:
    """The same plan for parameters in the model's layout."""
    inputs = kernel_input_axes(config)
    orders = {path: storage_order(len(plan.shapes[path]), axes) for path, axes in inputs.items()}
    shapes = {
        path: tuple(shape[axis] for axis in orders[path]) if path in orders else shape
        for path, shape in plan.shapes.items()
    }
    pieces = tuple(_transpose_piece(p, orders[p.path]) if p.path in orders else p for p in plan.pieces)
    return dataclasses.replace(plan, shapes=shapes, pieces=pieces)


def _transpose_piece(piece: Piece, order: tuple[int, ...]) -> Piece:
    slot: Slot = piece.slot + (slice(None),) * (len(order) - len(piece.slot))
    kept_axes = [axis for axis, index in enumerate(slot) if isinstance(index, slice)]  # axes of the take's result
    axes = tuple(kept_axes.index(axis) for axis in order if axis in kept_axes)
    transposed_slot = tuple(slot[axis] for axis in order)
    return dataclasses.replace(piece, slot=transposed_slot, take=_TransposedTake(piece.take, axes))
