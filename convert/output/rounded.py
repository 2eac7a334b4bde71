"""Writes a conversion with 8-bit matrices, one source tensor at a time.

A scale belongs to one output and covers all its inputs. Most pieces of a weight map hold whole outputs and are rounded
as they come. A parameter whose pieces hold parts of an output is assembled first.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np

from convert.output.own_scales import axes_in_slot, has_whole_outputs, own_scales
from convert.output.writer import Layout, ShardWriter, plan_layout
from convert.sources.base import Source
from convert.weights.rules import Piece, Plan, Slot
from tide_jax.model.architecture import DecoderConfig
from tide_jax.model.decoder import kernel_input_axes, summed_axes
from tide_jax.model.files.shards import cast_in_range
from tide_jax.model.fingerprints import Samples
from tide_jax.model.rounding import blocks, round_weights, scale_path

_INT8, _FLOAT32 = np.dtype(np.int8), np.dtype(np.float32)


@dataclasses.dataclass(frozen=True)
class _Part:
    """Content of ``parameter[slot]``: the floats, the source tensor's name, and the checkpoint's own scales if any."""

    path: str
    slot: Slot
    floats: np.ndarray
    source: str
    scales: np.ndarray | None = None


class RoundedPlan:
    """A plan in the model's layout, with integers and scales for rounded parameters.

    Args:
      plan: plan of the floats in the model's layout (`convert.output.stored.to_model_layout`).
      config: the architecture.
    """

    def __init__(self, plan: Plan, config: DecoderConfig) -> None:
        self._plan, self._config, self._axes = plan, config, summed_axes(config)
        self._samples = Samples(plan.shapes, kernel_input_axes(config))
        self._assembled_paths = {p.path for p in plan.pieces if not has_whole_outputs(p, self._axes.get(p.path, ()))}

    def layout(self, dtype: np.dtype, max_shard_bytes: float) -> Layout:
        """Lays out all parameters in files; scales follow their integers."""
        shapes: dict[str, tuple[int, ...]] = {}
        others: dict[str, np.dtype] = {}
        for path, shape in self._plan.shapes.items():
            shapes[path] = shape
            if (axes := self._axes.get(path)) is not None:
                name = scale_path(path)
                shapes[name] = tuple(size for axis, size in enumerate(shape) if axis not in axes)
                others |= {path: _INT8, name: _FLOAT32}
        return plan_layout(shapes, dtype, max_shard_bytes, others)

    def write(self, source: Source, writer: ShardWriter) -> Iterator[int]:
        """Writes all parameters; yields the number of bytes after each source tensor."""
        # Pieces with whole outputs are rounded and written at once.
        for name, pieces in self._plan.by_source().items():
            if ready := [piece for piece in pieces if piece.path not in self._assembled_paths]:
                yield self._write_pieces(source, source.read(name), ready, writer)
        # The other parameters are assembled in memory first.
        by_path = self._plan.by_path()
        for path in sorted(self._assembled_paths):
            yield self._write(_Part(path, (), self._assemble(source, path, by_path[path]), path), writer)

    def fingerprint(self) -> str | None:
        """Fingerprint of the floats; complete once everything is written."""
        return self._samples.digest(self._config)

    def _write_pieces(self, source: Source, tensor: np.ndarray, pieces: list[Piece], writer: ShardWriter) -> int:
        selected = [
            _Part(p.path, p.slot, p.take(tensor, self._config), p.source, self._own_scales(source, p)) for p in pieces
        ]
        return sum(self._write(part, writer) for part in selected)

    def _own_scales(self, source: Source, piece: Piece) -> np.ndarray | None:
        """The checkpoint's own scales for a piece, if any."""
        if (axes := self._axes.get(piece.path)) is None:
            return None
        return own_scales(source, piece, axes_in_slot(piece.slot, axes)[0], self._config)

    def _assemble(self, source: Source, path: str, pieces: list[Piece]) -> np.ndarray:
        floats = np.empty(self._plan.shapes[path], np.float32)
        for piece in pieces:
            selected = piece.take(source.read(piece.source), self._config)
            floats[piece.slot] = cast_in_range(selected, _FLOAT32, piece.source)
        return floats

    def _write(self, part: _Part, writer: ShardWriter) -> int:
        self._samples.take(part.path, part.slot, part.floats)
        if (axes := self._axes.get(part.path)) is None:
            return writer.write(part.path, part.slot, part.floats, part.source)
        summed, slot = axes_in_slot(part.slot, axes)
        written = 0
        for block in blocks(part.floats, summed):
            floats, start = part.floats[block], block.start
            own = part.scales if part.scales is None or 0 in summed else part.scales[block]
            integers, scale = round_weights(cast_in_range(floats, floats.dtype, part.source), summed, own)
            written += writer.write(part.path, part.slot, integers, part.source, start)
            written += writer.write(scale_path(part.path), slot, scale, part.source, start)
        return written
