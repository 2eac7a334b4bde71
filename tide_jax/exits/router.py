"""Routers, exit heads and translators: the weights that calibration trains beside the frozen model."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pallas_kernels.common import rms_normalise
from pallas_kernels.exit_step import Router, router_scores
from tide_jax.checks import instance_of, path_like, whole_number
from tide_jax.config import ExitConfig
from tide_jax.errors import TideError
from tide_jax.exits import router_file
from tide_jax.exits.translators import LayerTranslators, Translators
from tide_jax.model.decoder import Decoder, HeadRows
from tide_jax.model.files.checkpoint import fingerprint
from tide_jax.model.ops import matmul
from tide_jax.model.sharding import mesh_of, shard, whole_channels

FEATURES = 4
"""Input features of the second look for each token, see `tide_jax.exits.confidence.features`."""

SCREEN_LEVELS = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98)
"""Exit thresholds for which a second look stores a screen: the router score that a token must exceed to be scored."""


class Candidates(NamedTuple):
    """Frequent tokens whose logits the second look computes.

    Attributes:
      ids: token ids.
      rows: their rows of the model's output projection.
    """

    ids: Int[Array, " K"]
    rows: HeadRows


class Confidence(NamedTuple):
    """Second look of one exit point: a network over the features of `tide_jax.exits.confidence`, float32.

    Attributes:
      screens: for each of `SCREEN_LEVELS`, ascending: with an exit threshold of at least that level, tokens whose
        router score does not exceed the screen are not looked at.
      down, down_bias, up, up_bias: ``up . silu(down^T features + down_bias) + up_bias`` is the log odds that exiting
        is right.
    """

    screens: Float[Array, " levels"]
    down: Float[Array, "F H"]
    down_bias: Float[Array, " H"]
    up: Float[Array, " H"]
    up_bias: Float[Array, ""]

    def screen(self, threshold: Float[Array, ""]) -> Float[Array, ""]:
        """Router score that a token must exceed to get a second look at this exit threshold.

        Below it hardly any token would end above the threshold, and a look costs part of a layer. No score exceeds 1,
        so a threshold of 1 screens out everything.
        """
        level = jnp.sum(threshold >= jnp.asarray(SCREEN_LEVELS, jnp.float32), dtype=jnp.int32) - 1
        return jnp.where(threshold >= 1, jnp.float32(1), self.screens[jnp.maximum(level, 0)])

    def logit(self, features: Float[Array, "... F"]) -> Float[Array, "..."]:
        """Log odds that exiting is right."""
        lead = (1,) * (features.ndim - 1)
        hidden = jnp.dot(features, self.down, precision="highest") + self.down_bias.reshape(*lead, -1)
        return jnp.dot(jax.nn.silu(hidden), self.up, precision="highest") + self.up_bias


class ExitHead(NamedTuple):
    """An affine exit head: ``n + n @ factors[0] (@ factors[1]) + bias`` with ``n = rmsnorm(x)``.

    One factor ``[D, D]`` is a full-rank map, two factors ``[D, R], [R, D]`` a low-rank one. The model's final norm
    follows, so the output's scale does not matter. The idea is the tuned lens (Belrose et al. 2023, arXiv:2303.08112).
    """

    factors: tuple[Float[Array, "..."], ...]
    bias: Float[Array, " D"]

    def __call__(self, x: Float[Array, "... D"], *, eps: float) -> Float[Array, "... D"]:
        """Input of the final norm, in x's dtype."""
        rows = rms_normalise(x.reshape(-1, x.shape[-1]), eps)
        mapped = rows.astype(x.dtype)
        for factor in self.factors:
            mapped = matmul(mapped, factor.astype(x.dtype))
        out = rows + whole_channels(mapped).astype(jnp.float32) + self.bias.astype(jnp.float32)[None, :]
        return out.astype(x.dtype).reshape(x.shape)


@dataclasses.dataclass(frozen=True)
class RouterMetadata:
    """Origin of the routers: facts about the model, the fit and the data, as sorted JSON (hashable)."""

    text: str = "{}"

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> RouterMetadata:
        """Stores JSON-ready values."""
        return cls(json.dumps(values, sort_keys=True))

    def to_dict(self) -> dict[str, Any]:
        """The stored values."""
        return json.loads(self.text)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Routers:
    """Trained routers, exit heads and translators of one model: a pytree.

    Attributes:
      routers: one for each exit point.
      heads: one for each exit point with `exit_strategy` "affine"; None with "identity".
      exit_points: the exit points: 0-based layers after which a router sits, ascending.
      translators: maps from exit states to the inputs of skipped layers, for projecting keys and values; None uses
        exit states unchanged.
      candidates, confidence: the second look at tokens that pass the router, one network for each exit point; None
        lets the routers decide alone.
      metadata: origin of the routers; `report` is read from it.
    """

    routers: tuple[Router, ...]
    heads: tuple[ExitHead, ...] | None
    exit_points: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    translators: Translators | None = None
    candidates: Candidates | None = None
    confidence: tuple[Confidence, ...] | None = None
    metadata: RouterMetadata = dataclasses.field(default=RouterMetadata(), metadata={"static": True})

    @property
    def report(self) -> dict[str, Any]:
        """Calibration's measurements on held-out text; empty for routers made by hand."""
        return self.metadata.to_dict().get("report") or {}

    @property
    def exit_config(self) -> ExitConfig | None:
        """Exit settings that `tide_jax.guarantee` chose for these routers, promise included; None if none are stored.

        Raises:
          TideError: the stored settings can't be read.
        """
        found = self.metadata.to_dict().get("exit_config")
        return None if found is None else ExitConfig.from_dict(found)

    @property
    def exit_strategy(self) -> str:
        """ "identity" or "affine"."""
        return "identity" if self.heads is None else "affine"

    def exit_state(self, exit_point: int, x: Float[Array, "... D"], *, eps: float) -> Float[Array, "... D"]:
        """Input of the final norm for tokens that exit at exit point `exit_point`."""
        return x if self.heads is None else self.heads[exit_point](x, eps=eps)

    def scores(self, exit_point: int, x: Float[Array, "N D"], *, eps: float) -> Float[Array, " N"]:
        """Router scores of N tokens, float32."""
        return router_scores(x, self.routers[exit_point], eps=eps)

    def without_metadata(self) -> Routers:
        """The same weights without metadata, so that fits of one shape share compiled programs."""
        return dataclasses.replace(self, metadata=RouterMetadata())

    def save(self, path: str | Path) -> None:
        """Writes one safetensors file atomically: a kill leaves either the earlier file or the new one.

        Raises:
          TideError: the file can't be written, or a weight is NaN or infinite.
        """
        # One tensor for each field, named after its exit point's layer.
        path_like("path", path)
        metadata = self.metadata.to_dict() | {"exit_points": list(self.exit_points)}
        arrays = self._large_arrays() | {
            f"{c}.{n}": np.asarray(a) for c, r in self._by_exit_point(self.routers) for n, a in r._asdict().items()
        }
        if self.candidates is not None and self.confidence is not None:
            arrays["candidates"] = np.asarray(self.candidates.ids)
            looks = self._by_exit_point(self.confidence)
            arrays |= {f"{c}.confidence.{n}": np.asarray(a) for c, look in looks for n, a in look._asdict().items()}
        if broken := [name for name, array in arrays.items() if not np.isfinite(array).all()]:
            raise TideError(f"{path} is not written: tensor {broken[0]} of these routers holds NaN or infinity")
        router_file.write(Path(path), router_file.encode(arrays, metadata))

    @classmethod
    def load(cls, path: str | Path, *, model: Decoder, checkpoint_interval: int | None = None) -> Routers:
        """Reads routers written by `save`, checks that they belong to `model`, and puts them on its mesh, if any.

        Args:
          checkpoint_interval: the interval that the caller expects; None accepts the file's.

        Raises:
          TideError: the file is missing or damaged, belongs to another model (the message names both), has another
            exit point interval, or holds impossible exit settings or an impossible promise.
        """
        path_like("path", path)
        instance_of("model", model, Decoder)
        if checkpoint_interval is not None:
            whole_number("checkpoint_interval", checkpoint_interval, 1)
        # Check the metadata first: model, field types and interval.
        path = Path(path)
        tensors, metadata = router_file.read(path)
        _check_model(path, metadata, model)
        _check_types(path, metadata)
        interval = (metadata.get("config") or {}).get("checkpoint_interval")
        if checkpoint_interval is not None and interval != checkpoint_interval:
            raise TideError(
                f"{path} has a router every {_shown(interval)} layers, expected every {checkpoint_interval}; "
                "calibrate again with that checkpoint_interval or drop it"
            )
        # Read the tensors, each checked against the shape that the model and the exit points imply.
        reader = _Reader(path, tensors, model.config.hidden_size)
        exit_points = _exit_points(path, metadata, model.config.num_layers)
        _check_exits(path, metadata, len(exit_points))
        routers = tuple(reader.router(c) for c in exit_points)
        heads = translators = None
        if any(".factor." in name for name in tensors):
            heads = tuple(reader.head(c) for c in exit_points)
        if any(name.startswith("translators.") for name in tensors):
            translators = reader.translators(exit_points, model.config.num_layers)
        candidates, confidence = reader.second_look(exit_points, model)
        history = RouterMetadata.from_dict(metadata)
        found, mesh = cls(routers, heads, exit_points, translators, candidates, confidence, history), mesh_of(model)
        return jax.tree.map(jnp.asarray, found) if mesh is None else shard(found, mesh)

    def _large_arrays(self) -> dict[str, np.ndarray]:
        """Tensors of exit heads and translators."""
        arrays = dict[str, np.ndarray]()
        if self.heads is not None:
            arrays |= {f"{c}.{name}": a for c, h in self._by_exit_point(self.heads) for name, a in _head_arrays(h)}
        if self.translators is not None:
            arrays |= {f"translators.{c}.down": np.asarray(a) for c, a in self._by_exit_point(self.translators.down)}
            layers = [(i, entry) for i, entry in enumerate(self.translators.layers) if entry is not None]
            arrays |= {f"translators.{i}.{n}": np.asarray(a) for i, entry in layers for n, a in entry._asdict().items()}
        return arrays

    def _by_exit_point(self, items: tuple[Any, ...]) -> zip[tuple[int, Any]]:
        return zip(self.exit_points, items, strict=True)


def model_identity(model: Decoder) -> dict[str, Any]:
    """Fingerprint and description of a model; routers store them to recognise their model."""
    config = model.config
    return {
        "fingerprint": fingerprint(model),
        "model": f"{config.model_type}, {config.num_layers} layers of width {config.hidden_size}",
    }


def _check_model(path: Path, metadata: dict[str, Any], model: Decoder) -> None:
    expected = model_identity(model)
    if metadata.get("fingerprint") != expected["fingerprint"]:
        named, found = (_shown(metadata.get(name, "unknown")) for name in ("model", "fingerprint"))
        raise TideError(
            f"{path} was calibrated for {named} (fingerprint {found}), this model is {expected['model']} "
            f"(fingerprint {expected['fingerprint']}); calibrate routers for this model"
        )


def _head_arrays(head: ExitHead) -> list[tuple[str, np.ndarray]]:
    factors = [(f"factor.{i}", np.asarray(f)) for i, f in enumerate(head.factors)]
    return [*factors, ("bias", np.asarray(head.bias))]


def _exit_points(path: Path, metadata: dict[str, Any], num_layers: int) -> tuple[int, ...]:
    found = metadata.get("exit_points")
    layers = found if isinstance(found, list) and all(type(c) is int for c in found) else [-1]
    if not layers or sorted(set(layers)) != layers or not all(0 <= c < num_layers - 1 for c in layers):
        raise TideError(
            f"{path} names exit points {_shown(found)}, expected ascending layers below the last; calibrate again"
        )
    return tuple(layers)


def _shown(value: object, length: int = 80) -> str:
    return " ".join(str(value).split())[:length]


_METADATA = {"config": dict, "report": dict, "exit_config": dict, "no_guarantee": str, "guarantee_dtype": str}
_KINDS = {dict: "table of fields", str: "text"}


def _check_types(path: Path, metadata: dict[str, Any]) -> None:
    """Raises TideError if a metadata field that the package reads has the wrong type."""
    for name, kind in _METADATA.items():
        if not isinstance(metadata.get(name), kind | None):
            raise TideError(f"{path} is damaged: its {name} is no {_KINDS[kind]}; calibrate again")


def _check_exits(path: Path, metadata: dict[str, Any], count: int) -> None:
    """Raises TideError if the stored exit settings or their promise are impossible for `count` exit points."""
    if (settings := metadata.get("exit_config")) is None:
        return
    try:
        thresholds = ExitConfig.from_dict(settings).exit_threshold
    except TideError as error:
        raise TideError(f"{path} holds impossible exit settings: {_shown(error, 150)}; calibrate again") from error
    if isinstance(thresholds, tuple) and len(thresholds) != count:
        raise TideError(f"{path} has {len(thresholds)} thresholds for {count} exit points; calibrate again")


class _Reader(NamedTuple):
    """Reads the tensors of a router file and checks their shapes and values."""

    path: Path
    tensors: dict[str, np.ndarray]
    size: int

    def router(self, exit_point: int) -> Router:
        down = self._tensor(f"{exit_point}.down", (self.size, None))
        width = down.shape[1]
        bias, up = (self._tensor(f"{exit_point}.{name}", (width,)) for name in ("down_bias", "up"))
        return Router(down, bias, up, self._tensor(f"{exit_point}.up_bias", ()))

    def head(self, exit_point: int) -> ExitHead:
        bias = self._tensor(f"{exit_point}.bias", (self.size,))
        first = self._tensor(f"{exit_point}.factor.0", (self.size, None))
        if f"{exit_point}.factor.1" not in self.tensors:
            return ExitHead((self._tensor(f"{exit_point}.factor.0", (self.size, self.size)),), bias)
        return ExitHead((first, self._tensor(f"{exit_point}.factor.1", (first.shape[1], self.size))), bias)

    def second_look(
        self, exit_points: tuple[int, ...], model: Decoder
    ) -> tuple[Candidates | None, tuple[Confidence, ...] | None]:
        if not any(".confidence." in name or name == "candidates" for name in self.tensors):
            return None, None
        found = np.asarray(self._tensor("candidates", (None,)))
        known = (found >= 0) & (found < model.config.vocab_size + model.config.extra_tokens) & (found == np.rint(found))
        if not known.all() or len(np.unique(found)) != len(found) or len(found) < 2:
            raise TideError(f"{self.path}: candidates must be two or more different tokens; calibrate again")
        ids = jnp.asarray(found, jnp.int32)
        return Candidates(ids, model.head_rows(ids)), tuple(self._confidence(c) for c in exit_points)

    def _confidence(self, exit_point: int) -> Confidence:
        down = self._tensor(f"{exit_point}.confidence.down", (FEATURES, None))
        bias, up = (self._tensor(f"{exit_point}.confidence.{n}", down.shape[1:]) for n in ("down_bias", "up"))
        screens = self._tensor(f"{exit_point}.confidence.screens", (len(SCREEN_LEVELS),))
        return Confidence(screens, down, bias, up, self._tensor(f"{exit_point}.confidence.up_bias", ()))

    def translators(self, exit_points: tuple[int, ...], num_layers: int) -> Translators:
        first = self._tensor(f"translators.{exit_points[0]}.down", (self.size, None))
        rank = first.shape[1]
        down = tuple(self._tensor(f"translators.{c}.down", (self.size, rank)) for c in exit_points)
        return Translators(down, tuple(self._layer(i, exit_points, rank) for i in range(num_layers)))

    def _layer(self, layer: int, exit_points: tuple[int, ...], rank: int) -> LayerTranslators | None:
        count = sum(c + 1 < layer for c in exit_points)
        if count == 0:
            return None
        shift = self._tensor(f"translators.{layer}.shift", (count, self.size))
        return LayerTranslators(shift, self._tensor(f"translators.{layer}.up", (count, rank, self.size)))

    def _tensor(self, name: str, shape: tuple[int | None, ...]) -> Any:
        tensor = self.tensors.get(name)
        fits = tensor is not None and len(tensor.shape) == len(shape)
        least = 0 if name.startswith("translators.") else 1  # smallest size of an axis that `shape` leaves open
        if (
            tensor is None
            or not fits
            or not all(
                n >= least if width is None else n == width for n, width in zip(tensor.shape, shape, strict=True)
            )
        ):
            found = "missing" if tensor is None else f"of shape {tensor.shape}"
            raise TideError(f"{self.path}: tensor {name} is {found}, expected shape {shape}; calibrate again")
        if not np.isfinite(tensor).all():
            raise TideError(f"{self.path}: tensor {name} holds NaN or infinity; calibrate again")
        return tensor
