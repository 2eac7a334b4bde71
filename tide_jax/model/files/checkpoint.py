"""Loads models from converted directories, and from any source that the installed converter can open."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from tide_jax.checks import path_like
from tide_jax.errors import TideError, shorten
from tide_jax.json_files import read_json
from tide_jax.model.architecture import DecoderConfig
from tide_jax.model.decoder import Decoder, StoredParameter, stored_parameters
from tide_jax.model.files.converted_files import ConvertedFiles
from tide_jax.model.files.model_directory import model_directory, model_version
from tide_jax.model.fingerprints import digest, sample_places
from tide_jax.model.rounding import WEIGHTS, check_weights, precision
from tide_jax.model.sharding import check_mesh, fetch
from tide_jax.tokenizer.files import read_tokenizer

FORMAT = 4
CONFIG_KEY = "tide_jax"
WEIGHTS_KEY, FINGERPRINT_KEY = "weights", "fingerprint"
"""Keys in tide_jax's part of a converted config.json.

"weights" is "int8" if the matrices are 8-bit integers; "fingerprint" is that of the model they were rounded from.
"""
RUNNING_DTYPE_KEY = "running_dtype"
"""Key in tide_jax's part of a converted config.json: the default dtype to run in, if it is not the stored one."""
_DTYPES = ("float32", "bfloat16", "float16")


def load(
    source: str | Path,
    dtype: Any = None,
    *,
    weights: Any = None,
    mesh: Mesh | None = None,
    revision: str | None = None,
) -> Decoder:
    """Loads a model.

    Args:
      source: a directory that `convert` wrote, or any source that the installed converter opens: a Hugging Face
        directory, a hub id ("org/name", or "org/name@revision"), a GGUF file. All but the first are converted in
        memory. On a CPU, the weight files of a directory are memory-mapped: while the model is in use they may be
        replaced or removed, but not modified in place.
      dtype: "float32", "bfloat16" or "float16", as a name or a dtype. None is float32 on a CPU, where smaller types are
        slower, and the checkpoint's own dtype elsewhere. But float16 checkpoints of families whose activations are
        known to overflow float16 (Gemma 2 and 3, GLM 4) load in bfloat16.
      weights: "int8" rounds the matrices to 8-bit integers with a scale for each output, one tensor at a time
        (`tide_jax.model.rounding`); `dtype` then applies to all other parameters. None keeps the source's format:
        integers for a directory that was converted with ``weights="int8"``, floats for all others.
      mesh: devices to spread the model over, from `tide_jax.make_mesh`. Each tensor is split as it is read, so a device
        never holds more than its part, and the host never more than one tensor.
      revision: branch, tag or commit of a hub id.

    Raises:
      TideError: the source cannot be loaded, a file is damaged or replaced during loading, the dtype is not one of the
        three, `weights` is an unknown name or "float" for a directory that holds integers, `mesh` has no axes "data"
        and "model", or `revision` is given for files on disk.
    """
    path_like("source", source)
    dtype = _default_dtype() if dtype is None else parse_dtype(dtype)
    weights, mesh = check_weights(weights), None if mesh is None else check_mesh(mesh)
    if not _is_converted(source, revision):
        options = {"mesh": mesh, "revision": revision, "weights": weights}
        given = {name: value for name, value in options.items() if value is not None}
        # Not a converted directory: the installed converter opens it.
        model = _opener("model")(source, dtype, **given)
        model.config.generation.warn(str(source))
        return model
    # Remember the version, to notice if the directory is replaced while its files are read.
    version, directory = model_version(source), model_directory(source)
    settings = _settings(directory)
    config = _decoder(directory, settings)
    dtype = parse_dtype(settings.get(RUNNING_DTYPE_KEY, settings["dtype"])) if dtype is None else dtype
    files = ConvertedFiles(directory, config, parse_dtype(settings["dtype"]), settings.get(WEIGHTS_KEY, "float"))
    config.generation.warn(str(source))
    model = files.model(dtype, weights, mesh)
    model.float_fingerprint = settings.get(FINGERPRINT_KEY, model.float_fingerprint)
    if model_version(source) != version:
        raise TideError(f"{source} was replaced while it was read: load it again")
    return model


def load_config(source: str | Path, *, revision: str | None = None) -> DecoderConfig:
    """The architecture of any source that `load` takes; reads no weights.

    Raises:
      TideError: the source cannot be loaded, or `revision` is given for files on disk.
    """
    path_like("source", source)
    if not _is_converted(source, revision):
        return _opener("config")(source, revision=revision)
    directory = model_directory(source)
    return _decoder(directory, _settings(directory))


def load_tokenizer(source: str | Path, *, revision: str | None = None) -> Any:
    """The tokenizer of any source that `load` takes, or of a folder that holds only a tokenizer.

    It is a `transformers.PreTrainedTokenizerFast` with the token ids of tokenizer.json. For a hub id, only the
    tokenizer's files are downloaded. Code in the checkpoint is not run.

    Raises:
      TideError: the source cannot be loaded, it has no tokenizer, or `revision` is given for files on disk.
    """
    path_like("source", source)
    if not _is_converted(source, revision):
        return _opener("tokenizer")(source, revision=revision)
    return read_tokenizer(model_directory(source))


def parse_dtype(dtype: Any) -> jnp.dtype:
    """A parameter dtype from its name or a dtype-like. Raises TideError unless it is one of the three supported."""
    try:
        parsed = jnp.dtype(dtype)
    except TypeError:
        parsed = None
    if parsed is None or parsed.name not in _DTYPES:
        raise TideError(f"dtype={dtype!r} is not supported; choose one of {', '.join(_DTYPES)}")
    return parsed


def fingerprint(model: Decoder) -> str:
    """16 hexadecimal digits that identify a model, the same for loads in float32 and in bfloat16.

    A hash of the architecture and of a few values of every parameter, rounded to bfloat16. A load in float16 may have
    another fingerprint if the checkpoint is more precise than float16. A model with 8-bit weights has the fingerprint
    of the floats they were rounded from, so routers trained for one run on the other.
    """
    if model.float_fingerprint is not None:
        return model.float_fingerprint
    return digest(model.config, {parameter.path: _sample(parameter) for parameter in stored_parameters(model)})


def stored_precision(source: str | Path) -> str | None:
    """Precision of a converted directory, as `Decoder.precision`; None for other sources.

    Raises:
      TideError: as `load`.
    """
    if not is_converted(source):
        return None
    settings = _settings(model_directory(source))
    return precision(parse_dtype(settings["dtype"]), settings.get(WEIGHTS_KEY, "float"))


def is_converted(source: str | Path) -> bool:
    """Whether `source` is a directory that `convert` wrote."""
    path = model_directory(source) / "config.json"
    return path.is_file() and CONFIG_KEY in read_json(path)


def _is_converted(source: str | Path, revision: str | None) -> bool:
    """`is_converted`. Raises TideError for a converted directory with a revision: only hub ids have revisions."""
    converted = is_converted(source)
    if converted and revision is not None:
        raise TideError(f"{source} is on disk and has no revisions: leave out revision={revision!r}")
    return converted


def _settings(directory: Path) -> dict[str, Any]:
    settings = read_json(directory / "config.json")[CONFIG_KEY]
    found = settings.get("format") if isinstance(settings, dict) else None
    if found != FORMAT:
        raise TideError(
            f"{directory} was converted in format {shorten(found)}, this version of tide_jax reads format {FORMAT}: "
            "convert the checkpoint again"
        )
    if not isinstance(settings.get("decoder", {}), dict):
        raise TideError(f"{directory / 'config.json'} is damaged: its decoder entry is no object; convert again")
    if not isinstance(settings.get("dtype", ""), str):
        raise TideError(f"{directory / 'config.json'} is damaged: its dtype entry is no string; convert again")
    if (found := settings.get(WEIGHTS_KEY, "float")) not in WEIGHTS:
        raise TideError(
            f"{directory / 'config.json'} says weights={shorten(repr(found), 40)}, expected one of "
            f"{', '.join(WEIGHTS)}: convert again, or use the version of tide_jax that wrote it"
        )
    if not isinstance(settings.get(FINGERPRINT_KEY, ""), str):
        raise TideError(f"{directory / 'config.json'} is damaged: its fingerprint entry is no string; convert again")
    if missing := {"decoder", "dtype"} - set(settings):
        raise TideError(f"{directory / 'config.json'} lacks {', '.join(sorted(missing))}: convert the checkpoint again")
    return settings


def _decoder(directory: Path, settings: dict[str, Any]) -> DecoderConfig:
    try:
        return DecoderConfig.from_dict(settings["decoder"])
    except TideError as error:
        raise TideError(f"{directory / 'config.json'}: {error}") from error


def _default_dtype() -> jnp.dtype | None:
    return jnp.dtype(jnp.float32) if jax.default_backend() == "cpu" else None


def _opener(name: str) -> Callable[..., Any]:
    """The function that the installed converter registered under `name`; this package does not import the converter."""
    found = entry_points(group="tide_jax.sources", name=name)
    if not found:
        raise TideError("only converted models can be loaded: no converter is installed, run `pip install tide_jax`")
    return next(iter(found)).load()


def _sample(parameter: StoredParameter) -> np.ndarray:
    """Evenly spaced elements of a parameter's known shape, read from where they are stored."""
    kernel = parameter.value
    stored = sample_places(kernel.shape, parameter.input_axes)
    in_host_memory = kernel.is_fully_addressable and all(device.platform == "cpu" for device in kernel.devices())
    # On a CPU numpy reads the array in place, which avoids dispatching hundreds of gathers.
    return np.asarray(kernel)[stored] if in_host_memory else np.asarray(fetch(kernel[stored]))
