"""Export: writes a converted directory as a Hugging Face checkpoint again.

A weight map says which view of a source tensor fills which slot of a parameter. Export writes the parameters back
through those views and so fills the source tensor. One table serves both directions.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from convert.architecture import family_of
from convert.configuration.older_names import add_older_names
from convert.conversion import RECORD_FILE, Progress, check_destination, versions, write_json
from convert.families import FAMILIES
from convert.output.replacement import check_no_foreign_files, files_of, replace_directory
from convert.output.stored import to_model_layout
from convert.output.writer import ShardWriter, plan_layout, split_slot
from convert.probe.rules import from_json
from convert.sources.huggingface import copy_side_files
from convert.weights.rules import Piece, Rule, plan_conversion
from tide_jax.checks import path_like
from tide_jax.errors import TideError
from tide_jax.json_files import read_json
from tide_jax.model.decoder import summed_axes
from tide_jax.model.files.checkpoint import CONFIG_KEY, WEIGHTS_KEY, is_converted, load_config, parse_dtype
from tide_jax.model.files.converted_files import check_types
from tide_jax.model.files.model_directory import model_directory
from tide_jax.model.files.shards import ShardedTensors, TensorInfo
from tide_jax.model.rounding import check_scales, scale_path
from tide_jax.tokenizer.files import read_tokenizer

EXPORT_FILE = "export.json"
_CONVERT_AGAIN = "convert the checkpoint again"


@dataclasses.dataclass(frozen=True)
class ExportReport:
    """Result of an export.

    Attributes:
      source, destination: where the model came from and went to.
      model_type: the family.
      dtype: dtype of the written tensors.
      parameters: number of weights.
      bytes: size of the written weights.
      shards: names of the weight files.
      ignored: tensors or parts of tensors of the original checkpoint that are missing here, with the reason.
    """

    source: str
    destination: str
    model_type: str
    dtype: str
    parameters: int
    bytes: int
    shards: tuple[str, ...]
    ignored: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Returns JSON-ready values."""
        return dataclasses.asdict(self)


class ConvertedSource:
    """Presents a converted directory as the checkpoint it was made from; see `convert.sources.base.Source`.

    Attributes:
      description: the directory.
      config: config.json of the original checkpoint.
      generation_config: its generation_config.json, empty if there is none.
      tensors: original shape and dtype name of each converted tensor.
      files: the weight files.
      ignored: other tensors or parts of tensors of the original, with the reason why the conversion left them out.
      dtype: dtype of the stored floats; 8-bit integers are read as the floats they represent.

    Raises:
      TideError: not a converted directory, damaged, or made by a version with another weight map.
    """

    def __init__(self, path: Path) -> None:
        if not is_converted(path):
            raise TideError(f"{path} is not a converted model: expected a directory that 'tide-jax convert' made")
        self._directory = directory = model_directory(path)
        self._decoder = load_config(directory)
        self._parameters = ShardedTensors(directory)
        self.description = str(path)
        self.config = read_json(directory / "config.json")
        settings = self.config.pop(CONFIG_KEY)
        self._check_blocks()
        self.dtype = parse_dtype(settings["dtype"])
        self._axes = summed_axes(self._decoder) if settings.get(WEIGHTS_KEY) == "int8" else {}
        if not self._decoder.tie_embeddings:
            self.config["tie_word_embeddings"] = False
        generation = directory / "generation_config.json"
        self.generation_config = read_json(generation) if generation.is_file() else {}
        self.files = self._parameters.files
        # Rebuild the conversion's plan from its record, and check that the files have the parameters the plan expects.
        recorded = _read_recorded_tensors(directory / RECORD_FILE)
        try:
            plan = to_model_layout(plan_conversion(recorded, self._rules(), self._decoder), self._decoder)
        except TideError as error:
            raise TideError(f"{directory} was converted with another weight map: {_CONVERT_AGAIN} ({error})") from error
        check_types(directory, self._parameters.infos, self._axes)
        _check_shapes(directory, self._parameters.infos, plan.shapes | self._scale_shapes(plan.shapes))
        self._pieces = plan.by_source()
        self.tensors: Mapping[str, TensorInfo] = {name: recorded[name] for name in (*self._pieces, *plan.blank)}
        self.ignored = plan.ignored | self._unused_parts()
        self._check_complete()

    def read(self, name: str) -> np.ndarray:
        """Reads one tensor of the original checkpoint, in the dtype the conversion stored.

        Raises:
          TideError: the weight map does arithmetic on the tensor, so there is no way back.
        """
        tensor = np.zeros(self.tensors[name].shape, self.dtype)
        # Fill the tensor through the same views that the conversion read.
        for piece in self._pieces.get(name, ()):
            view = piece.take(tensor, self._decoder)
            if np.shares_memory(view, tensor) and view.flags.writeable:
                view[...] = self._read_slot(piece)
            else:  # heads that are not adjacent have no view
                tensor.reshape(-1)[self._indices(piece, tensor.shape)] = self._read_slot(piece)
        return tensor

    def _indices(self, piece: Piece, shape: tuple[int, ...]) -> np.ndarray:
        """Indices into the source tensor for the elements of a slot, found by rearranging an array of indices."""
        indices = np.arange(math.prod(shape)).reshape(shape)
        positions = piece.take(indices, self._decoder)
        # A pure rearrangement commutes with adding 1 and uses no element twice.
        moved = np.array_equal(piece.take(indices + 1, self._decoder), positions + 1)
        if not moved or np.unique(positions).size != positions.size:
            raise TideError(f"{piece.source} cannot be exported: its conversion does more than rearrange numbers")
        return positions

    def _rules(self) -> tuple[Rule, ...]:
        """Weight map of the conversion: the family's, or the one found by probing."""
        probed = read_json(self._directory / RECORD_FILE).get("probed")
        return family_of(self).rules if probed is None else from_json(probed["weight_map"])

    def write_side_files(self, directory: Path) -> None:
        """Copies tokenizer files and generation_config.json."""
        copy_side_files(self._directory, directory)

    def load_tokenizer(self) -> Any:
        """Returns the converted tokenizer. Raises TideError if there is none."""
        return read_tokenizer(self._directory)

    def _check_blocks(self) -> None:
        """Raises TideError if layers had adapters to a shared block, which their copies of it have taken in."""
        family = FAMILIES.get(self.config.get("model_type", ""))
        if family is not None and family.shared_blocks is not None and family.shared_blocks.adapters:
            raise TideError(
                f"{self.description} cannot be exported: layers' adapters to a shared block are merged into a copy of "
                "the block for each layer, and cannot be told from it; keep the original checkpoint"
            )

    def _check_complete(self) -> None:
        """Raises TideError if texts longer than the conversion's context need a tensor that was left out."""
        longest = self.config.get("max_position_embeddings")
        table = self._decoder.learned_positions  # some models never use its first rows
        if self.ignored and not table and isinstance(longest, int) and self._decoder.max_positions < longest:
            name, reason = next(iter(self.ignored.items()))
            raise TideError(
                f"{self.description} cannot be exported: it was converted for {self._decoder.max_positions} of "
                f"{longest} tokens, without {name} ({reason})"
            )

    def _unused_parts(self) -> dict[str, str]:
        """Tensors of which the conversion kept only a part."""
        parts: dict[str, str] = {}
        for name, pieces in self._pieces.items():
            dummy = np.broadcast_to(np.zeros((), np.int8), self.tensors[name].shape)
            if (unused := dummy.size - sum(piece.take(dummy, self._decoder).size for piece in pieces)) > 0:
                parts[name] = f"{unused} of its {dummy.size} numbers, which the model does not use, are zeros"
        return parts

    def _scale_shapes(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        """Shapes of the scales beside the 8-bit parameters."""
        return {
            scale_path(path): tuple(size for axis, size in enumerate(shapes[path]) if axis not in axes)
            for path, axes in self._axes.items()
        }

    def _read_slot(self, piece: Piece) -> np.ndarray:
        leading, inner = split_slot(piece.slot)
        if (axes := self._axes.get(piece.path)) is None:
            return self._parameters.read(piece.path, leading)[inner]
        integers = self._parameters.read_stored(piece.path, leading)
        name = scale_path(piece.path)
        scale = check_scales(name, self._parameters.read(name), self.description)
        # A scale has size 1 along the axes it covers.
        position = tuple(0 if axis in axes else index for axis, index in enumerate(leading))
        return (integers.astype(np.float32) * np.expand_dims(scale, axes)[position])[inner]


def export(
    converted_dir: str | Path,
    destination: str | Path,
    *,
    dtype: Any = None,
    overwrite: bool = False,
    max_shard_bytes: float = 5e9,
    progress: Progress | None = None,
) -> ExportReport:
    """Writes a converted model as a Hugging Face checkpoint that `from_pretrained` loads, with the same logits.

    8-bit weights are written as the floats they represent. The directory appears complete or not at all. Memory use
    stays near the largest tensor of the checkpoint.

    Args:
      converted_dir: a directory `convert` made, from any source.
      destination: the directory to make.
      dtype: "float32", "bfloat16" or "float16"; None keeps the conversion's.
      overwrite: replace an earlier export at `destination`, but no other files there.
      max_shard_bytes: largest size of a weight file.
      progress: called with (bytes of weights written, bytes in all).

    Raises:
      TideError: there is no converted model, or another version's weight map made it; a weight overflows `dtype`; the
        destination is taken or cannot be written.
    """
    path_like("source", converted_dir)
    path_like("destination", destination)
    source, destination = ConvertedSource(Path(converted_dir).expanduser()), Path(destination).expanduser()
    stored_dtype = source.dtype if dtype is None else parse_dtype(dtype)

    def check() -> None:
        check_destination(destination, overwrite, _is_export, "an export")

    check()
    shapes = {name: info.shape for name, info in source.tensors.items()}
    layout = dataclasses.replace(plan_layout(shapes, stored_dtype, max_shard_bytes), framework="pt")
    report = ExportReport(
        source=source.description,
        destination=str(destination),
        model_type=source.config["model_type"],
        dtype=stored_dtype.name,
        parameters=layout.total_bytes // stored_dtype.itemsize,
        bytes=layout.total_bytes,
        shards=tuple(layout.shards),
        ignored=source.ignored,
    )
    with replace_directory(destination, layout.total_bytes, check, EXPORT_FILE) as partial:
        source.write_side_files(partial)
        settings = _set_dtype(source.config, stored_dtype.name) | {"dtype": stored_dtype.name}
        write_json(partial / "config.json", add_older_names(settings))
        check_no_foreign_files(partial, destination, EXPORT_FILE)
        with ShardWriter(partial, layout) as writer:
            done = 0
            for name in shapes:
                writer.write(name, (), source.read(name), name)
                done += layout.nbytes(name)
                if progress is not None:
                    progress(done, layout.total_bytes)
            writer.sync()
        record = report.to_dict() | {"versions": versions(), "files": [*files_of(partial), EXPORT_FILE]}
        del record["destination"]
        write_json(partial / EXPORT_FILE, record)
    return report


def _set_dtype(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """Sets the dtype of a config.json and its nested parts, under whichever of the two names is in use."""
    written = {key: _set_dtype(value, dtype) if isinstance(value, dict) else value for key, value in config.items()}
    return written | {key: dtype for key in ("dtype", "torch_dtype") if config.get(key)}


def _read_recorded_tensors(path: Path) -> dict[str, TensorInfo]:
    """Names, dtypes and shapes of the original checkpoint's tensors, from the conversion's record."""
    recorded = read_json(path).get("source_tensors")
    if not isinstance(recorded, dict):
        raise TideError(
            f"{path} does not list the original checkpoint's tensors because an older version made it: {_CONVERT_AGAIN}"
        )
    try:
        return {name: TensorInfo(tuple(map(int, shape)), str(dtype)) for name, (dtype, shape) in recorded.items()}
    except (TypeError, ValueError) as error:
        raise TideError(
            f"{path} is damaged, its source_tensors are not [dtype, shape] pairs: {_CONVERT_AGAIN}"
        ) from error


def _check_shapes(directory: Path, found: Mapping[str, TensorInfo], expected: Mapping[str, tuple[int, ...]]) -> None:
    shapes = {name: info.shape for name, info in found.items()}
    if different := sorted(name for name in {*shapes, *expected} if shapes.get(name) != expected.get(name)):
        name = different[0]
        raise TideError(
            f"{directory} holds {len(different)} parameters that do not fit its configuration ({name} has shape "
            f"{shapes.get(name)}, expected {expected.get(name)}): {_CONVERT_AGAIN}"
        )


def _is_export(directory: Path) -> bool:
    directory = model_directory(directory)
    return (directory / EXPORT_FILE).is_file() and (directory / "config.json").is_file()
