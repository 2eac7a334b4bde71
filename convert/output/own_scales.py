"""Keeps the scales of checkpoints that already hold 8-bit integers, arranged as the model stores its own scales.

A source gives the step of each number in a tensor: the unit the number is a multiple of
(`convert.sources.base.steps_of`). The array of steps passes through the weight map like the tensor itself. If all
numbers of an output share one step, that step becomes the output's scale.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from convert.sources.base import Source, steps_of
from convert.weights.rules import Piece, Plan, Slot
from tide_jax.model.architecture import DecoderConfig
from tide_jax.model.decoder import summed_axes


def has_whole_outputs(piece: Piece, axes: tuple[int, ...]) -> bool:
    """Whether a piece has all inputs of the outputs it fills; `axes` are those a product sums over."""
    return all(isinstance(index, slice) for axis, index in enumerate(piece.slot) if axis in axes)


def axes_in_slot(slot: Slot, axes: tuple[int, ...]) -> tuple[tuple[int, ...], Slot]:
    """Translates a parameter's summed axes to axes of a slot's content; also returns the slot of the scales."""
    fixed = [axis for axis, index in enumerate(slot) if isinstance(index, int)]
    summed = tuple(axis - sum(f < axis for f in fixed) for axis in axes)
    return summed, tuple(index for axis, index in enumerate(slot) if axis not in axes)


def own_scales(source: Source, piece: Piece, summed: tuple[int, ...], config: DecoderConfig) -> np.ndarray | None:
    """Returns float32 scales of the outputs that a piece fills, 0 where unknown; None if the source has no scales.

    Args:
      piece: has all inputs of its outputs.
      summed: axes of the piece's content that a product sums over.
    """
    if (steps := steps_of(source, piece.source)) is None:
        return None
    selected = piece.take(steps, config)
    least, most = selected.min(axis=summed), selected.max(axis=summed)
    return np.where(least == most, most, np.float32(0))


def scales_by_path(source: Source, plan: Plan, config: DecoderConfig) -> Callable[[str], np.ndarray | None]:
    """Returns a function from a path to the parameter's scales, for `tide_jax.model.decoder.from_parameters`."""
    axes, pieces = summed_axes(config), plan.by_path()

    def scales(path: str) -> np.ndarray | None:
        shape = plan.shapes[path]
        result = np.zeros([size for axis, size in enumerate(shape) if axis not in axes[path]], np.float32)
        for piece in pieces[path]:
            summed, slot = axes_in_slot(piece.slot, axes[path])
            own = own_scales(source, piece, summed, config) if has_whole_outputs(piece, axes[path]) else None
            result[slot] = 0 if own is None else own
        return result if result.any() else None

    return scales
