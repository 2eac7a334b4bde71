"""Builds a model from the weight files of a converted directory, floats or 8-bit integers."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from tide_jax.errors import TideError
from tide_jax.model.architecture import DecoderConfig
from tide_jax.model.decoder import Decoder, abstract_parameters, from_parameters, summed_axes
from tide_jax.model.files.shards import ShardedTensors, TensorInfo, cast_in_range
from tide_jax.model.rounding import Weights, check_scales, kept_as_floats, scale_path

logger = logging.getLogger(__name__)


class ConvertedFiles:
    """The tensors of a converted directory.

    Args:
      directory: the folder of the files.
      config: the architecture.
      stored: dtype of the floats in the files.
      held: format of the matrices in the files.

    Raises:
      TideError: a file is missing or damaged, or a tensor's type does not match `held`.
    """

    def __init__(self, directory: Path, config: DecoderConfig, stored: jnp.dtype, held: Weights) -> None:
        self._directory, self._config, self._stored, self._held = directory, config, stored, held
        self._tensors = ShardedTensors(directory)
        self._axes = summed_axes(config) if held == "int8" else {}
        self._scales = {scale_path(path) for path in self._axes}
        check_types(directory, self._tensors.infos, self._axes)

    def model(self, dtype: jnp.dtype, weights: Weights | None, mesh: Mesh | None) -> Decoder:
        """The model, built one tensor at a time.

        Args:
          dtype: dtype of the floats.
          weights: format of the model's matrices; None keeps that of the files.
          mesh: the devices to put the model on, see `tide_jax.load`.

        Raises:
          TideError: floats are requested but the files hold integers; or a tensor is missing, has a wrong shape or
            holds invalid values.
        """
        if weights == "float" and self._held == "int8":
            raise TideError(
                f"{self._directory} holds int8 weights, and weights='float' asks for floats: leave weights out, or "
                "convert the checkpoint again without int8"
            )
        rounding = weights == "int8" and self._held == "float"
        if rounding:
            log_kept(self._config)
        tensors = self._for_rounding(dtype) if rounding else self._cast_floats(dtype, mesh)
        try:
            kind = self._held if weights is None else weights
            return from_parameters(self._config, tensors, dtype=dtype, mesh=mesh, stored=True, weights=kind)
        except TideError as error:
            if self._held == "float" or str(self._directory) in str(error):
                raise
            raise TideError(f"{self._directory}: {error}; convert the checkpoint again") from error

    def _cast_floats(self, dtype: jnp.dtype, mesh: Mesh | None) -> Iterator[tuple[str, np.ndarray]]:
        """Floats cast to `dtype`; integers and their scales unchanged.

        A device that uses the host's memory computes on mapped files. Other devices receive one tensor at a time.
        """
        in_place = mesh is None and jax.default_backend() == "cpu"
        for name in self._tensors.infos:
            if name in self._axes:
                yield name, (self._tensors.map_stored if in_place else self._tensors.read_stored)(name)
            elif name in self._scales:
                scale = self._tensors.map(name) if in_place else self._tensors.read(name)
                yield name, check_scales(name, scale, str(self._directory))
            else:
                read = self._tensors.map if in_place and dtype == self._stored else self._tensors.read
                yield name, cast_in_range(read(name), dtype, name)

    def _for_rounding(self, dtype: jnp.dtype) -> Iterator[tuple[str, np.ndarray]]:
        """Tensors that will be rounded in their stored dtype, the others in `dtype`; all finite."""
        axes = summed_axes(self._config)
        for name in self._tensors.infos:
            tensor = self._tensors.read(name)
            yield name, cast_in_range(tensor, tensor.dtype if name in axes else dtype, name)


def check_types(directory: Path, infos: Mapping[str, TensorInfo], axes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises TideError unless the parameters in `axes` are 8-bit integers and their scales float32."""
    expected = dict.fromkeys(axes, "I8") | {scale_path(path): "F32" for path in axes}
    if wrong := [name for name in infos if expected.get(name, infos[name].dtype) != infos[name].dtype]:
        name = wrong[0]
        raise TideError(
            f"{directory}: {name} is of type {infos[name].dtype}, expected {expected[name]}, as of int8 weights "
            f"({len(wrong)} such): convert the checkpoint again"
        )


def log_kept(config: DecoderConfig) -> None:
    """Logs which matrices stay floats when the others are rounded."""
    left = kept_as_floats(abstract_parameters(config), summed_axes(config))
    logger.info("weights='int8' leaves as floats, beside norms and biases: %s", ", ".join(left) or "nothing")
