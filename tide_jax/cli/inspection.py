"""Describes a model without loading its weights, for ``tide-jax inspect``."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from tide_jax.config import CalibrationConfig, exit_point_layers
from tide_jax.exits.router import Routers
from tide_jax.model.architecture import DecoderConfig
from tide_jax.model.decoder import abstract_parameters, stored_shapes, summed_axes
from tide_jax.model.files.checkpoint import load, load_config, stored_precision
from tide_jax.model.rounding import kept_as_floats, tensor_bytes
from tide_jax.risk.promise import no_guarantee_reason

_FLOAT32, _INT8, _FLOAT16 = 4, 1, 2
_LOOKUP_TABLES = ("embed.", "positions.", "added.")  # a token reads one row of each of these tables
_EXPERT_HEADS = (".attention.q", ".attention.out")


def describe_model(source: str | Path, *, interval: int = 4, bottleneck: int = 128) -> dict[str, Any]:
    """Facts about a model as JSON-ready values: configuration, exit points, parameter and router bytes.

    "bytes_read" counts the weights that a token reads at full depth, in their stored format: those of all layers, of
    each only the chosen experts, and those of the head. "stored" is the precision of a converted directory; None for
    other sources.

    Raises:
      TideError: the source cannot be loaded, or `interval` or `bottleneck` is below 1.
    """
    CalibrationConfig(checkpoint_interval=interval, router_bottleneck_dim=bottleneck)
    config = load_config(source)
    exit_points = exit_point_layers(config.num_layers, interval)
    parameters = sum(math.prod(shape) for shape in abstract_parameters(config).values())
    return {
        "model_type": config.model_type,
        "layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "heads": config.num_heads,
        "kv_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "vocabulary": config.vocab_size,
        "context_length": config.context_length,
        "parameters": parameters,
        "bytes": {"float32": parameters * _FLOAT32, "bfloat16": parameters * 2},
        "stored": stored_precision(source),
        "bytes_read": bytes_read(config),
        "kept_as_floats": kept_as_floats(abstract_parameters(config), summed_axes(config)),
        "checkpoint_interval": interval,
        "exit_points": list(exit_points),
        "router_file_bytes": router_bytes(config, len(exit_points), bottleneck),
        "affine_head_file_bytes": len(exit_points) * config.hidden_size * (config.hidden_size + 1) * _FLOAT16,
        "translator_bytes": translator_bytes(config, exit_points, CalibrationConfig.translator_rank or 0),
        "config": config.to_dict(),
    }


def bytes_read(config: DecoderConfig) -> dict[str, int]:
    """Bytes of weights that a token reads at full depth, by dtype, without and with 8-bit weights."""
    shapes, axes = stored_shapes(config), summed_axes(config)
    read = {path: shape for path, shape in shapes.items() if not path.startswith(_LOOKUP_TABLES)}
    if config.tie_embeddings:
        read["embed.kernel"] = shapes["embed.kernel"]
    read = {path: _shape_read(config, path, shape) for path, shape in read.items()}
    sizes = {"float32": _FLOAT32, "bfloat16": 2, "float16": 2}
    floats = {name: tensor_bytes(read, {}, size) for name, size in sizes.items()}
    return floats | {f"{name} with int8 weights": tensor_bytes(read, axes, size) for name, size in sizes.items()}


def _shape_read(config: DecoderConfig, path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of the part of a parameter that a token reads: of stacked experts, only the chosen ones."""
    moe = config.moe if ".experts." in path else config.attention_experts if path.endswith(_EXPERT_HEADS) else None
    return shape if moe is None else (moe.experts_per_token, *shape[1:])


def router_bytes(config: DecoderConfig, count: int, bottleneck: int) -> int:
    """Tensor bytes of a router file: int8 down-projections with float32 column scales, biases and up-projections."""
    return count * (config.hidden_size * bottleneck * _INT8 + (3 * bottleneck + 1) * _FLOAT32)


def translator_bytes(config: DecoderConfig, exit_points: tuple[int, ...], rank: int) -> int:
    """Tensor bytes that translators add to the affine heads' file.

    Each exit point has one map out of it; each layer has one map from each exit point at least two layers before it.
    """
    maps = sum(c + 1 < layer for c in exit_points for layer in range(config.num_layers))
    return config.hidden_size * (len(exit_points) * rank + maps * (rank + 1)) * _FLOAT16


def describe_routers(path: str | Path, source: str | Path) -> dict[str, Any]:
    """Facts about a router file. Raises TideError if it does not belong to the model."""
    path = Path(path)
    routers = Routers.load(path, model=load(source))
    metadata, exits = routers.metadata.to_dict(), routers.exit_config
    return {
        "files": {str(path): path.stat().st_size},
        "exit_points": list(routers.exit_points),
        "exit_strategy": routers.exit_strategy,
        "translators": routers.translators is not None,
        "second_look": routers.confidence is not None,
        "label": routers.report.get("label"),
        "data": metadata.get("data"),
        "exit_config": None if exits is None else exits.to_dict(),
        "promise": exits.guarantee.summary() if exits is not None and exits.guarantee is not None else None,
        "no_guarantee": no_guarantee_reason(routers),
    }


def format_facts(facts: dict[str, Any]) -> str:
    """The facts as aligned lines of text."""
    size, exit_points = facts["bytes"], ", ".join(map(str, facts["exit_points"])) or "none"
    heads = f"{facts['heads']} heads, {facts['kv_heads']} for keys and values"
    rows = {
        "family": facts["model_type"],
        "layers": f"{facts['layers']} of width {facts['hidden_size']}",
        "attention": f"{heads}, {facts['head_dim']} channels each",
        "vocabulary": f"{facts['vocabulary']:,}",
        "context": f"{facts['context_length']:,} tokens",
        "parameters": f"{facts['parameters'] / 1e6:,.1f} million: {_megabytes(size['float32'])} in float32, "
        f"{_megabytes(size['bfloat16'])} in bfloat16",
        "reads": _bytes_read_line(facts),
        "exit_points": f"after layers {exit_points} (every {facts['checkpoint_interval']})",
        "router file": f"{_megabytes(facts['router_file_bytes'])}, affine exit heads "
        f"{_megabytes(facts['affine_head_file_bytes'])}, translators {_megabytes(facts['translator_bytes'])}",
    }
    if "routers" in facts:
        routers = facts["routers"]
        layers = ", ".join(map(str, routers["exit_points"]))
        parts = {"second_look": "a second look", "translators": "translators for skipped layers"}
        extras = "".join(f", with {part}" for name, part in parts.items() if routers[name])
        rows["routers"] = f"{routers['exit_strategy']} exits after layers {layers}{extras}, fitted to {routers['data']}"
        rows["promise"] = routers["promise"] or f"none: {routers['no_guarantee'] or 'none was requested'}"
    width = max(map(len, rows))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows.items())


def _bytes_read_line(facts: dict[str, Any]) -> str:
    """The line about the bytes that a token reads: as stored, or in float32, and with 8-bit weights."""
    stored, sizes = facts["stored"] or "float32", facts["bytes_read"]
    now = f"{_megabytes(sizes[stored])} of weights a token at full depth, in {stored}"
    rounded = f"{stored} with int8 weights"
    return f"{now}; {_megabytes(sizes[rounded])} with int8 weights" if rounded in sizes else now


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.2f} MB" if count < 1e7 else f"{count / 1e6:,.0f} MB"
