"""Checkpoints with quantised weights, dequantised while they are read.

Each method is one entry of `METHODS`: it finds the packed weights and says how to read them.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from convert.sources.huggingface import HuggingFaceSource
from convert.sources.quantised.floats import bitsandbytes, fp8, mxfp4, plain_numbers
from convert.sources.quantised.integers import awq, gptq, packed_integers
from convert.sources.quantised.parts import Method, Packed, Settings, Stored, unsupported_error
from convert.sources.quantised.settings import describe_problem
from tide_jax.errors import shorten
from tide_jax.model.files.shards import DTYPES, TensorInfo

logger = logging.getLogger(__name__)
CONFIG_KEY = "quantization_config"
_PLAIN_DTYPES = (*DTYPES, "F64")
# Scales of activations and caches; conversion drops them, because the model computes both without quantisation.
_ACTIVATION_SCALES = re.compile(
    r".*\.(input_scale|input_zero_point|activation_scale|output_scale|[qkv]_scale|[kv]_zero_point)"
)


class QuantisedSource:
    """Presents a checkpoint of quantised weights as one of plain weights; see `convert.sources.base.Source`.

    A checkpoint of plain weights that kept its quantisation settings is read as it is, with a warning.

    `tensors` gives a weight the dtype of its scales, or the one that the method's own data names, else float32. Reading
    computes in float32 without rounding, so a conversion to float32 keeps the exact dequantised values.

    Attributes:
      ignored: stored tensors that quantise activations and are not needed, with the reason.

    Raises:
      TideError: the method, or a variant of it, is not supported; a part of a weight is missing or malformed.
    """

    rewritten = True

    def __init__(self, stored: HuggingFaceSource) -> None:
        self._stored = stored
        self._weights = _packed_weights(stored, stored.config[CONFIG_KEY])
        self.description, self.files = stored.description, stored.files
        self.config = {key: value for key, value in stored.config.items() if key != CONFIG_KEY}
        self.generation_config = stored.generation_config
        parts = {part: name for name, weight in self._weights.items() for part in weight.parts}
        unpacked = [name for name in stored.tensors if name not in parts]
        self.ignored = {name: "quantises activations" for name in unpacked if _ACTIVATION_SCALES.fullmatch(name)}
        # In the order of the files; a weight takes the place of its first part.
        names = dict.fromkeys(parts.get(name, name) for name in stored.tensors if name not in self.ignored)
        self.tensors: Mapping[str, TensorInfo] = {
            name: self._weights[name].info if name in self._weights else stored.tensors[name] for name in names
        }
        logger.info("%s: %d weights will be dequantised", self.description, len(self._weights))

    def read(self, name: str) -> np.ndarray:
        """Reads one tensor, dequantised if it is packed."""
        weight = self._weights.get(name)
        return self._stored.read(name) if weight is None else weight.unpack()

    def steps(self, name: str) -> np.ndarray | None:
        """As `convert.sources.base.steps_of`."""
        weight = self._weights.get(name)
        if weight is None or weight.scales is None:
            return None
        return np.broadcast_to(weight.scales().astype(np.float32), weight.info.shape)

    def write_side_files(self, directory: Path) -> None:
        """Copies tokenizer files and generation_config.json."""
        self._stored.write_side_files(directory)

    def load_tokenizer(self) -> Any:
        """Returns the checkpoint's tokenizer. Raises TideError if there is none."""
        return self._stored.load_tokenizer()


def compressed_tensors(stored: Stored, settings: Settings) -> dict[str, Packed]:
    """Files of the compressed-tensors package, if all weights are quantised in the same plain way."""
    groups = list((settings.get("config_groups") or {}).values())
    forms = {group.get("format") or settings.get("format") for group in groups}
    schemes = [group["weights"] for group in groups if group.get("weights")]
    if len(forms) != 1 or not schemes or any(scheme != schemes[0] for scheme in schemes):
        raise unsupported_error(stored, "compressed-tensors weights quantised in several ways are not supported")
    for key in ("sparsity_config", "transform_config"):
        if settings.get(key) and settings[key].get("format", key) != "dense":
            raise unsupported_error(stored, f"compressed-tensors weights with a {key} are not supported")
    form, scheme = forms.pop(), schemes[0]
    if form == "pack-quantized":
        size = scheme.get("group_size") if scheme.get("strategy") == "group" else None
        return packed_integers(stored, scheme.get("num_bits", 8), size)
    if form in ("float-quantized", "int-quantized", "naive-quantized") and scheme.get("num_bits", 8) == 8:
        return plain_numbers(stored, scheme)
    raise unsupported_error(stored, f"compressed-tensors weights in the format {shorten(form)!r} are not supported")


METHODS: dict[str, Method] = {
    "gptq": gptq,
    "awq": awq,
    "bitsandbytes": bitsandbytes,
    "fp8": fp8,
    "mxfp8": fp8,
    "mxfp4": mxfp4,
    "compressed-tensors": compressed_tensors,
}


def _packed_weights(stored: Stored, settings: Any) -> dict[str, Packed]:
    if not isinstance(settings, dict):
        raise unsupported_error(stored, f"config.json has {CONFIG_KEY}={shorten(repr(settings))}, expected an object")
    if (problem := describe_problem(settings)) is not None:
        raise unsupported_error(stored, f"config.json's {CONFIG_KEY} has {problem}")
    old = settings.get("load_in_4bit") or settings.get("load_in_8bit")
    method = settings.get("quant_method", "bitsandbytes" if old else None)
    if method not in METHODS:
        method_name = shorten(method or "an unknown method")
        raise unsupported_error(
            stored, f"weights quantised with {method_name} are not supported, only with {', '.join(METHODS)}"
        )
    weights = METHODS[method](stored, settings)
    if weights:
        return weights
    if not all(info.dtype in _PLAIN_DTYPES for info in stored.tensors.values()):
        raise unsupported_error(stored, f"config.json says that the weights are quantised with {method}, but none is")
    logger.warning(
        "%s: config.json says that the weights are quantised with %s, but they are plain numbers and are read as "
        "such; the checkpoint seems to have kept its %s when it was dequantised",
        stored.description,
        method,
        CONFIG_KEY,
    )
    return {}
