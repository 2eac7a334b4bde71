"""Models on disk: loading converted directories, and anything an installed converter can open."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.sharding import Mesh

from tide_jax.checks import path_like
from tide_jax.config import DecoderConfig
from tide_jax.decoder import Decoder, StoredParameter, from_parameters, stored_parameters
from tide_jax.errors import TideError
from tide_jax.sharding import checked_mesh, fetch
from tide_jax.shards import ShardedTensors, checked_cast, read_json

FORMAT = 2
CONFIG_KEY = "tide_jax"
_DTYPES = ("float32", "bfloat16", "float16")
_SAMPLES = 16


def load(source: str | Path, dtype: Any = None, *, mesh: Mesh | None = None) -> Decoder:
    """Loads a model.

    Args:
      source: a directory `convert` wrote, or whatever the installed converter opens: a Hugging Face directory, a hub
        id, a GGUF file. These are converted in memory. A directory's weight files are mapped on a CPU: they may be
        replaced or removed while the model lives, but not written into.
      dtype: "float32", "bfloat16" or "float16", as a name or a dtype. None is float32 on a CPU, where smaller types
        are slower, and the checkpoint's own elsewhere.
      mesh: devices to spread the model over, from `tide_jax.make_mesh`: each tensor is split as it is read, so that no
        device ever holds more than its part, and the host one tensor.

    Raises:
      TideError: nothing loadable is there, a file is damaged, the dtype is not one of the three, or `mesh` has no axes
        "data" and "model".
    """
    path_like("source", source)
    dtype = _default_dtype() if dtype is None else parse_dtype(dtype)
    mesh = None if mesh is None else checked_mesh(mesh)
    if not is_converted(source):
        return _opener("model")(source, dtype, **({} if mesh is None else {"mesh": mesh}))
    directory = Path(source).expanduser()
    settings = _settings(directory)
    config = DecoderConfig.from_dict(settings["decoder"])
    tensors = ShardedTensors(directory)
    dtype = parse_dtype(settings["dtype"]) if dtype is None else dtype
    # A device that keeps its data in the host's memory can work on a mapped file; others are given a tensor at a time.
    mapped = mesh is None and jax.default_backend() == "cpu" and dtype == parse_dtype(settings["dtype"])
    read = tensors.map if mapped else tensors.read
    checked = ((name, checked_cast(read(name), dtype, name)) for name in tensors.infos)
    return from_parameters(config, checked, dtype=dtype, mesh=mesh, stored=True)


def load_config(source: str | Path) -> DecoderConfig:
    """The architecture of anything `load` takes; no weights are read.

    Raises:
      TideError: nothing loadable is there.
    """
    path_like("source", source)
    if not is_converted(source):
        return _opener("config")(source)
    return DecoderConfig.from_dict(_settings(Path(source).expanduser())["decoder"])


def load_tokenizer(source: str | Path) -> Any:
    """The tokenizer of anything `load` takes, a `transformers.PreTrainedTokenizerFast`.

    Raises:
      TideError: nothing loadable is there, or it has no tokenizer.
    """
    path_like("source", source)
    if not is_converted(source):
        return _opener("tokenizer")(source)
    return tokenizer_in(Path(source).expanduser())


def tokenizer_in(directory: Path) -> Any:
    """The tokenizer whose files lie in a directory. Raises TideError where there is none."""
    try:
        return _tokenizer_class(directory).from_pretrained(directory)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        reason = " ".join(str(error).split())
        raise TideError(
            f"{directory} has no tokenizer that transformers can load: put its tokenizer.json there ({reason})"
        ) from error


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
    may have another one where its checkpoint is finer than float16.
    """
    fields = dataclasses.asdict(model.config)
    for name in ("model_type", "eos_token_ids", "pad_token_id"):
        del fields[name]
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode())
    for parameter in stored_parameters(model):
        digest.update(_sample(parameter).tobytes())
    return digest.hexdigest()[:16]


def is_converted(source: str | Path) -> bool:
    """Whether `source` is a directory that `convert` wrote."""
    path = Path(source).expanduser() / "config.json"
    return path.is_file() and CONFIG_KEY in read_json(path)


def _settings(directory: Path) -> dict[str, Any]:
    settings = read_json(directory / "config.json")[CONFIG_KEY]
    found = settings.get("format") if isinstance(settings, dict) else None
    if found != FORMAT:
        raise TideError(
            f"{directory} was converted in format {found}, this version of tide_jax reads format {FORMAT}: convert the "
            "checkpoint again"
        )
    if not isinstance(settings.get("decoder", {}), dict):
        raise TideError(f"{directory / 'config.json'} is damaged: its decoder entry is no object; convert again")
    if missing := {"decoder", "dtype"} - set(settings):
        raise TideError(f"{directory / 'config.json'} lacks {', '.join(sorted(missing))}: convert the checkpoint again")
    return settings


def _tokenizer_class(directory: Path) -> Any:
    """What loads a directory's tokenizer: `AutoTokenizer`, or the class that it would choose anyway where the directory
    says so. `AutoTokenizer` imports torch where that is installed, which takes seconds and 300 MB."""
    path = directory / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    named = settings.get("tokenizer_class") if isinstance(settings, dict) else None
    if named == "TokenizersBackend" and (directory / "tokenizer.json").is_file():
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast
    from transformers import AutoTokenizer

    return AutoTokenizer


def _default_dtype() -> jnp.dtype | None:
    return jnp.dtype(jnp.float32) if jax.default_backend() == "cpu" else None


def _opener(name: str) -> Callable[..., Any]:
    """What the installed converter registered under `name`; this package does not import it."""
    found = entry_points(group="tide_jax.sources", name=name)
    if not found:
        raise TideError("only converted models can be loaded: no converter is installed, run `pip install tide_jax`")
    return next(iter(found)).load()


def _sample(parameter: StoredParameter) -> np.ndarray:
    """Evenly spaced elements of the shape it is known by, rounded to bfloat16; read where they are stored."""
    kernel, axes = parameter.value, parameter.input_axes
    outputs = kernel.ndim - axes
    places = np.linspace(0, kernel.size - 1, _SAMPLES).astype(np.int64)
    index = np.unravel_index(places, kernel.shape[outputs:] + kernel.shape[:outputs])
    stored = tuple(axis.astype(np.int32) for axis in index[axes:] + index[:axes])
    in_host_memory = kernel.is_fully_addressable and all(device.platform == "cpu" for device in kernel.devices())
    # On a CPU the array is a view for numpy, and hundreds of gathers would each be dispatched.
    picked = np.asarray(kernel)[stored] if in_host_memory else np.asarray(fetch(kernel[stored]))
    return picked.astype(ml_dtypes.bfloat16)
