"""Models on disk: loading converted directories, and anything an installed converter can open."""

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
from tide_jax.errors import TideError, shortened
from tide_jax.json_files import read_json
from tide_jax.model.architecture import DecoderConfig
from tide_jax.model.decoder import Decoder, StoredParameter, stored_parameters
from tide_jax.model.files.converted_files import ConvertedFiles
from tide_jax.model.files.model_directory import model_directory, model_version
from tide_jax.model.fingerprints import digest, sampled_places
from tide_jax.model.rounding import WEIGHTS, checked_weights, precision
from tide_jax.model.sharding import checked_mesh, fetch
from tide_jax.tokenizer.files import tokenizer_in

FORMAT = 3
CONFIG_KEY = "tide_jax"
WEIGHTS_KEY, FINGERPRINT_KEY = "weights", "fingerprint"
"""In a converted config.json's own part: "int8" where matrices are 8-bit integers, and the name of what was rounded."""
RUNNING_DTYPE_KEY = "running_dtype"
"""In a converted config.json's own part: the dtype to run in by default, where that is not the stored one."""
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
      source: a directory `convert` wrote, or whatever the installed converter opens: a Hugging Face directory, a hub
        id ("org/name", or "org/name@revision"), a GGUF file. These are converted in memory. A directory's weight files
        are mapped on a CPU: they may be replaced or removed while the model lives, but not written into.
      dtype: "float32", "bfloat16" or "float16", as a name or a dtype. None is float32 on a CPU, where smaller types
        are slower, and the checkpoint's own elsewhere: but bfloat16 for float16 checkpoints of families whose
        activations are known to overflow float16 (Gemma 2 and 3, GLM 4).
      weights: "int8" rounds the matrices to 8-bit integers with a scale for each output, a tensor at a time
        (`tide_jax.model.rounding`), which `dtype` then is not about. None keeps what the source holds: a directory
        converted with ``weights="int8"`` holds integers, and only those; all else is "float".
      mesh: devices to spread the model over, from `tide_jax.make_mesh`: each tensor is split as it is read, so that no
        device ever holds more than its part, and the host one tensor.
      revision: branch, tag or commit of a hub id.

    Raises:
      TideError: nothing loadable is there, a file is damaged or replaced meanwhile, the dtype is not one of the three,
        `weights` is another name or "float" for a directory that holds integers, `mesh` has no axes "data" and
        "model", or `revision` is given for files on disk.
    """
    path_like("source", source)
    dtype = _default_dtype() if dtype is None else parse_dtype(dtype)
    weights, mesh = checked_weights(weights), None if mesh is None else checked_mesh(mesh)
    if not _is_converted(source, revision):
        options = {"mesh": mesh, "revision": revision, "weights": weights}
        given = {name: value for name, value in options.items() if value is not None}
        model = _opener("model")(source, dtype, **given)
        model.config.generation.warn(str(source))
        return model
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
    """The architecture of anything `load` takes; no weights are read.

    Raises:
      TideError: nothing loadable is there, or `revision` is given for files on disk.
    """
    path_like("source", source)
    if not _is_converted(source, revision):
        return _opener("config")(source, revision=revision)
    directory = model_directory(source)
    return _decoder(directory, _settings(directory))


def load_tokenizer(source: str | Path, *, revision: str | None = None) -> Any:
    """The tokenizer of anything `load` takes, or of a folder that holds only a tokenizer.

    It is a `transformers.PreTrainedTokenizerFast`, and its token ids are those of tokenizer.json. Of a hub id only the
    tokenizer's files are downloaded. Code that a checkpoint brings is not run.

    Raises:
      TideError: nothing loadable is there, it has no tokenizer, or `revision` is given for files on disk.
    """
    path_like("source", source)
    if not _is_converted(source, revision):
        return _opener("tokenizer")(source, revision=revision)
    return tokenizer_in(model_directory(source))


def parse_dtype(dtype: Any) -> jnp.dtype:
    """A parameter dtype from its name or a dtype-like. Raises TideError for any but the three supported."""
    try:
        parsed = jnp.dtype(dtype)
    except TypeError:
        parsed = None
    if parsed is None or parsed.name not in _DTYPES:
        raise TideError(f"dtype={dtype!r} is not supported; choose one of {', '.join(_DTYPES)}")
    return parsed


def fingerprint(model: Decoder) -> str:
    """16 hexadecimal digits that tell models apart, the same for a model loaded in float32 and in bfloat16.

    A hash of the architecture and of a few values of every parameter, rounded to bfloat16. A model loaded in float16
    may have another one where its checkpoint is finer than float16. A model with 8-bit weights has that of the floats
    they were rounded from, so that routers for either run on the other.
    """
    if model.float_fingerprint is not None:
        return model.float_fingerprint
    return digest(model.config, {parameter.path: _sample(parameter) for parameter in stored_parameters(model)})


def stored_as(source: str | Path) -> str | None:
    """What a converted directory holds, as `Decoder.precision`; None for other sources. Raises TideError as `load`."""
    if not is_converted(source):
        return None
    settings = _settings(model_directory(source))
    return precision(parse_dtype(settings["dtype"]), settings.get(WEIGHTS_KEY, "float"))


def is_converted(source: str | Path) -> bool:
    """Whether `source` is a directory that `convert` wrote."""
    path = model_directory(source) / "config.json"
    return path.is_file() and CONFIG_KEY in read_json(path)


def _is_converted(source: str | Path, revision: str | None) -> bool:
    """`is_converted`. Raises TideError for a converted directory with a revision, which only a hub id has."""
    converted = is_converted(source)
    if converted and revision is not None:
        raise TideError(f"{source} is a directory on disk: revision={revision!r} is of hub ids, leave it out")
    return converted


def _settings(directory: Path) -> dict[str, Any]:
    settings = read_json(directory / "config.json")[CONFIG_KEY]
    found = settings.get("format") if isinstance(settings, dict) else None
    if found != FORMAT:
        raise TideError(
            f"{directory} was converted in format {shortened(found)}, this version of tide_jax reads format {FORMAT}: "
            "convert the checkpoint again"
        )
    if not isinstance(settings.get("decoder", {}), dict):
        raise TideError(f"{directory / 'config.json'} is damaged: its decoder entry is no object; convert again")
    if not isinstance(settings.get("dtype", ""), str):
        raise TideError(f"{directory / 'config.json'} is damaged: its dtype entry is no string; convert again")
    if (found := settings.get(WEIGHTS_KEY, "float")) not in WEIGHTS:
        raise TideError(
            f"{directory / 'config.json'} says weights={shortened(repr(found), 40)}, expected one of "
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
    """What the installed converter registered under `name`; this package does not import it."""
    found = entry_points(group="tide_jax.sources", name=name)
    if not found:
        raise TideError("only converted models can be loaded: no converter is installed, run `pip install tide_jax`")
    return next(iter(found)).load()


def _sample(parameter: StoredParameter) -> np.ndarray:
    """Evenly spaced elements of the shape it is known by; read where they are stored."""
    kernel = parameter.value
    stored = sampled_places(kernel.shape, parameter.input_axes)
    in_host_memory = kernel.is_fully_addressable and all(device.platform == "cpu" for device in kernel.devices())
    # On a CPU the array is a view for numpy, and hundreds of gathers would each be dispatched.
    return np.asarray(kernel)[stored] if in_host_memory else np.asarray(fetch(kernel[stored]))
