"""Converts a checkpoint: plans, writes and verifies the weights, then moves the result into place in one step."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from convert.architecture import Architecture, architecture_of
from convert.output.own_scales import scales_by_path
from convert.output.replacement import check_no_foreign_files, files_of, is_free, replace_directory
from convert.output.rounded import RoundedPlan
from convert.output.stored import to_model_layout
from convert.output.writer import Layout, ShardWriter, plan_layout
from convert.probe.run import verify_probed_model
from convert.sources.base import Source
from convert.sources.lora import merge_adapter
from convert.sources.open import open_source
from convert.sources.shared_blocks import with_own_blocks
from convert.sources.text_model import text_decoder
from convert.verify import Verification, require_torch, verify_conversion
from convert.verify_weights import verify_weights
from convert.weights.rules import Piece, Plan, plan_conversion
from tide_jax.checks import path_like
from tide_jax.errors import TideError
from tide_jax.model.architecture import DecoderConfig
from tide_jax.model.decoder import Decoder, from_parameters, summed_axes
from tide_jax.model.files.checkpoint import (
    CONFIG_KEY,
    FINGERPRINT_KEY,
    FORMAT,
    RUNNING_DTYPE_KEY,
    WEIGHTS_KEY,
    is_converted,
    load,
    parse_dtype,
)
from tide_jax.model.files.converted_files import log_kept
from tide_jax.model.files.shards import DTYPES, cast_in_range
from tide_jax.model.rounding import Weights, check_weights

Progress = Callable[[int, int], None]
RECORD_FILE = "conversion.json"
_RECORDED_PACKAGES = ("tide_jax", "jax", "transformers", "numpy", "safetensors")


@dataclasses.dataclass(frozen=True)
class ConversionReport:
    """Result of a conversion, or the plan of one with `dry_run`.

    Attributes:
      source, destination: where the model came from and went to.
      model_type: the family.
      dtype: dtype of the written parameters that are not integers.
      weights: how the matrices are written, "float" or "int8".
      parameters: number of weights.
      bytes: size of the written weights.
      shards: names of the weight files.
      ignored: source tensors left out, with the reason.
      probed: result of probing, for model types in no table (see `convert.probe.run`).
      verification: difference between the logits and transformers', None if not measured.
      dry_run: nothing was written.
    """

    source: str
    destination: str
    model_type: str
    dtype: str
    parameters: int
    bytes: int
    shards: tuple[str, ...]
    ignored: dict[str, str]
    probed: dict[str, Any] | None = None
    verification: Verification | None = None
    dry_run: bool = False
    weights: Weights = "float"

    def to_dict(self) -> dict[str, Any]:
        """Returns JSON-ready values."""
        return dataclasses.asdict(self)


def convert(
    source_ref: str | Path,
    destination: str | Path,
    *,
    adapter: str | Path | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    dtype: Any = None,
    weights: Any = None,
    verify: bool = False,
    dry_run: bool = False,
    overwrite: bool = False,
    max_shard_bytes: float = 5e9,
    progress: Progress | None = None,
) -> ConversionReport:
    """Converts a checkpoint into a directory that `tide_jax.load` reads.

    The directory appears complete or not at all. If the process is killed while it replaces a directory, the old model
    or the new one is there, never a mixture. Memory use (beyond the interpreter's) stays below the largest source
    tensor plus 1 GiB.

    Args:
      source_ref: a Hugging Face directory, a hub id or a GGUF file.
      destination: the directory to make.
      adapter: a LoRA adapter to merge into the checkpoint: PEFT's directory or a hub id.
      revision: branch, tag or commit of the hub id `source_ref`. "org/name@revision" does the same, also for adapters.
      trust_remote_code: run the Python code in the checkpoint, to probe a model type that neither the table of families
        nor transformers knows.
      dtype: "float32", "bfloat16" or "float16". None keeps the checkpoint's dtype; for a quantised checkpoint the dtype
        of its scales (float32 in GGUF).
      weights: "int8" rounds the checkpoint's matrices to 8-bit integers with a scale for each output
        (`tide_jax.model.rounding`); `dtype` then applies to all other parameters. None and "float" round nothing.
      verify: compare logits with transformers' and record the difference; needs torch. For 8-bit weights the bounds are
        looser, and the record also has a divergence and a share of equal tokens. Because of the looser bounds, their
        files are also read again and compared with the source's numbers (`convert.verify_weights`).
      dry_run: check everything that names and shapes can show, and write nothing.
      overwrite: replace an earlier conversion at `destination`, but no other files there.
      max_shard_bytes: largest size of a weight file.
      progress: called with (bytes of weights written, bytes in all).

    Raises:
      TideError: the source cannot be read, is not supported or does not fit its configuration; the adapter does not fit
        the source; a weight is NaN, infinite or overflows `dtype`; the destination is taken or cannot be written; the
        logits differ; or 8-bit weights differ from the source's by more than rounding.
    """
    path_like("source", source_ref)
    path_like("destination", destination)
    if verify:
        require_torch()
    weight_format: Weights = check_weights(weights) or "float"
    source, destination = _open(source_ref, adapter, revision), Path(destination).expanduser()

    def check() -> None:
        check_destination(destination, overwrite, is_converted, "a converted model")

    # Check the destination before the slow work; `replace_directory` checks it again before the result moves there.
    check()
    # Plan: map every source tensor to parameters, and lay these out in files.
    architecture = architecture_of(source, trust_remote_code=trust_remote_code)
    config = architecture.config
    plan = to_model_layout(plan_conversion(source.tensors, architecture.rules, config), config)
    stored_dtype = parse_dtype(_source_dtype(source, plan) if dtype is None else dtype)
    running_dtype = _running_dtype(stored_dtype, architecture) if dtype is None else stored_dtype
    rounded = RoundedPlan(plan, config) if weight_format == "int8" else None
    if rounded is None:
        layout = plan_layout(plan.shapes, stored_dtype, max_shard_bytes)
    else:
        layout = rounded.layout(stored_dtype, max_shard_bytes)
        log_kept(config)
    report = ConversionReport(
        source=source.description,
        destination=str(destination),
        model_type=config.model_type,
        dtype=stored_dtype.name,
        parameters=sum(map(math.prod, plan.shapes.values())),
        bytes=layout.total_bytes,
        shards=tuple(layout.shards),
        ignored=plan.ignored | getattr(source, "ignored", {}),
        probed=architecture.probed,
        dry_run=dry_run,
        weights=weight_format,
    )
    if dry_run:
        return report
    # Write the small files first, so that a bad destination fails before the weights are written.
    with replace_directory(destination, layout.total_bytes, check, RECORD_FILE) as partial:
        settings = {"format": FORMAT, "decoder": config.to_dict(), "dtype": stored_dtype.name}
        if running_dtype != stored_dtype:
            settings[RUNNING_DTYPE_KEY] = running_dtype.name
        if rounded is not None:
            settings[WEIGHTS_KEY] = weight_format
        source.write_side_files(partial)
        _write_config(source, settings, partial)
        check_no_foreign_files(partial, destination, RECORD_FILE)
        _write_weights(source, rounded or _FloatPlan(plan, config), layout, partial, progress)
        # The fingerprint is known once all integers are written, so config.json is written again.
        if rounded is not None and (name := rounded.fingerprint()) is not None:
            _write_config(source, settings | {FINGERPRINT_KEY: name}, partial)
        # Verify before `replace_directory` moves the folder into place: a failed check leaves no model behind.
        if verify:
            if rounded is not None:
                verify_weights(partial, config, _assemble_parameters(source, plan, config, weight_format, stored_dtype))
            model = load(partial, "float32")
            if architecture.probed is None:
                verification = verify_conversion(source, model, stored_dtype)
            else:
                verification = verify_probed_model(source, model, stored_dtype, trust_remote_code=trust_remote_code)
            report = dataclasses.replace(report, verification=verification)
        _write_record(source, report, partial)
    return report


def open_model(
    source_ref: str | Path,
    dtype: Any = None,
    *,
    weights: Any = None,
    adapter: str | Path | None = None,
    trust_remote_code: bool = False,
    mesh: Mesh | None = None,
    revision: str | None = None,
) -> Decoder:
    """Converts a checkpoint in memory and writes nothing.

    Args:
      source_ref: a Hugging Face directory, a hub id or a GGUF file.
      dtype: "float32", "bfloat16" or "float16". None keeps the checkpoint's dtype, but runs float16 checkpoints in
        bfloat16 if the family is known to overflow float16.
      weights: "int8" rounds the matrices, as in `convert`; None and "float" do not.
      adapter: a LoRA adapter to merge.
      trust_remote_code: as in `convert`.
      mesh: as in `tide_jax.load`.
      revision: as in `convert`.

    Raises:
      TideError: as `convert`.
    """
    weight_format: Weights = check_weights(weights) or "float"
    source = _open(source_ref, adapter, revision)
    architecture = architecture_of(source, trust_remote_code=trust_remote_code)
    config = architecture.config
    plan = to_model_layout(plan_conversion(source.tensors, architecture.rules, config), config)
    target = (
        _running_dtype(parse_dtype(_source_dtype(source, plan)), architecture) if dtype is None else parse_dtype(dtype)
    )
    if weight_format == "int8":
        log_kept(config)
    return from_parameters(
        config,
        _assemble_parameters(source, plan, config, weight_format, target),
        dtype=target,
        mesh=mesh,
        stored=True,
        weights=weight_format,
        own_scales=scales_by_path(source, plan, config),
    )


def open_config(source_ref: str | Path, *, revision: str | None = None) -> DecoderConfig:
    """Returns the architecture of a checkpoint without reading weights. Raises TideError as `convert`."""
    return architecture_of(_open(source_ref, revision=revision)).config


def _open(source_ref: str | Path, adapter: str | Path | None = None, revision: str | None = None) -> Source:
    base = open_source(source_ref, revision=revision)
    return with_own_blocks(text_decoder(base if adapter is None else merge_adapter(base, adapter)))


def _assemble_parameters(
    source: Source, plan: Plan, config: DecoderConfig, weight_format: Weights, floats: np.dtype
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields each parameter, assembled from its pieces: in float32 if it will be rounded, else in `floats`."""
    rounded = summed_axes(config) if weight_format == "int8" else {}
    for path, pieces in plan.by_path().items():
        dtype = np.dtype(np.float32) if path in rounded else floats
        parameter = np.empty(plan.shapes[path], dtype)
        for piece in pieces:
            part = piece.take(source.read(piece.source), config)
            parameter[piece.slot] = cast_in_range(part, dtype, piece.source)
        yield path, parameter


def _source_dtype(source: Source, plan: Plan) -> str:
    """Dtype of most of the source's weights; float32 if that is quantised or unknown."""
    sizes: dict[str, int] = {}
    for name in plan.by_source():
        info = source.tensors[name]
        sizes[info.dtype] = sizes.get(info.dtype, 0) + math.prod(info.shape)
    most_common = max(sizes, key=sizes.__getitem__)
    return DTYPES[most_common].name if most_common in DTYPES else "float32"


def _running_dtype(stored_dtype: np.dtype, architecture: Architecture) -> np.dtype:
    """Default dtype to run in: the stored dtype, but bfloat16 if activations overflow float16."""
    overflows = architecture.overflows_float16 and stored_dtype == np.float16
    return parse_dtype("bfloat16") if overflows else stored_dtype


@dataclasses.dataclass(frozen=True)
class _FloatPlan:
    """Writes parameters as they are; `RoundedPlan` is the 8-bit counterpart."""

    plan: Plan
    config: DecoderConfig

    def write(self, source: Source, writer: ShardWriter) -> Iterator[int]:
        for name, pieces in self.plan.by_source().items():
            yield self._write(source.read(name), pieces, writer)

    def _write(self, tensor: np.ndarray, pieces: list[Piece], writer: ShardWriter) -> int:
        """Writes one source tensor to every parameter that uses it; returns the number of bytes."""
        parts = [piece.take(tensor, self.config) for piece in pieces]
        return sum(writer.write(p.path, p.slot, part, p.source) for p, part in zip(pieces, parts, strict=True))


def _write_weights(
    source: Source,
    plan: _FloatPlan | RoundedPlan,
    layout: Layout,
    directory: Path,
    progress: Progress | None,
) -> None:
    done = 0
    with ShardWriter(directory, layout) as writer:
        for written in plan.write(source, writer):
            done += written
            if progress is not None:
                progress(done, layout.total_bytes)
        writer.sync()


def _write_config(source: Source, settings: dict[str, Any], directory: Path) -> None:
    write_json(directory / "config.json", {**source.config, CONFIG_KEY: settings})


def _write_record(source: Source, report: ConversionReport, directory: Path) -> None:
    record = report.to_dict()
    del record["dry_run"], record["destination"]
    record["source_sha256"] = {file.name: _sha256(file) for file in source.files}
    record["source_tensors"] = {name: [info.dtype, list(info.shape)] for name, info in source.tensors.items()}
    record["versions"] = versions()
    record["files"] = [*files_of(directory), RECORD_FILE]
    write_json(directory / RECORD_FILE, record)


def versions() -> dict[str, str | None]:
    """Versions of the packages a conversion depends on, for its record."""
    return {name: _version(name) for name in _RECORDED_PACKAGES}


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Writes a JSON object, indented."""
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def check_destination(destination: Path, overwrite: bool, replaceable: Callable[[Path], bool], kind: str) -> None:
    """Raises TideError unless `destination` is free, or `overwrite` is set and `replaceable` accepts it as a `kind`."""
    if not destination.exists() or (destination.is_dir() and is_free(destination)):
        return
    if not destination.is_dir():
        raise TideError(f"{destination} is a file: expected a new directory")
    if not overwrite:
        raise TideError(f"{destination} exists and is not empty: choose another destination or pass --overwrite")
    if not replaceable(destination):
        raise TideError(f"{destination} does not hold {kind}: choose another destination")
