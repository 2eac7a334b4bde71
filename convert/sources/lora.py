"""Merges LoRA adapters into their base checkpoint while it is read.

Low-rank adaptation (Hu et al. 2021, arXiv:2106.09685) adds the product of two thin matrices to a weight. Its scale may
be rank-stabilised (Kalajdzievski 2023, arXiv:2312.03732), and the norm of the sum may be learned separately (DoRA, Liu
et al. 2024, arXiv:2402.09353). Directories have the PEFT package's format: adapter_config.json,
adapter_model.safetensors.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import regex

from convert.families import FAMILIES
from convert.sources.base import ADAPTER_CONFIG, CONV1D_TYPES, Source, steps_of
from convert.sources.hub import local_directory
from convert.sources.huggingface import copy_side_files
from tide_jax.checks import real_number, whole_number
from tide_jax.errors import TideError, shorten
from tide_jax.json_files import read_json
from tide_jax.model.files.shards import ShardedTensors, TensorInfo
from tide_jax.tokenizer.chat_files import chat_templates, remove_template_files
from tide_jax.tokenizer.files import read_tokenizer

ADAPTER_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_READ_KEYS = (
    *("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "fan_in_fan_out", "use_dora"),
    *("trainable_token_indices", "ensure_weight_tying", "init_lora_weights", "peft_type"),
)
_TRAINING_KEYS = (  # describes the training, or which modules were adapted, which the stored names tell too
    *("auto_mapping", "base_model_name_or_path", "bias", "exclude_modules", "inference_mode", "layers_pattern"),
    *("layers_to_transform", "lora_bias", "lora_dropout", "megatron_core", "modules_to_save", "peft_version"),
    *("qalora_group_size", "revision", "runtime_config", "target_modules", "task_type", "modules_to_tie"),
    *("target_modules_to_tie", "eva_config", "corda_config", "loftq_config", "lora_ga_config", "merge_weights"),
)
_SUPPORTED_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")  # others change the base weights first
_ROLES = {
    "lora_A.weight": "a",
    "lora_B.weight": "b",
    "lora_embedding_A": "embedding_a",
    "lora_embedding_B": "embedding_b",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
    "token_adapter.trainable_tokens_delta": "rows",
    "base_layer.weight": "base",
}
_PAIRS = {"a": "b", "embedding_a": "embedding_b"}
_COMMON_NAME_PATTERNS = {  # for models without a table entry: multimodal and probed ones
    "embed.kernel": r"(.*\.)?(embed_tokens|wte|embed_in|word_embeddings|tok_embeddings)\.weight",
    "head.kernel": r"(.*\.)?(lm_head|embed_out)\.weight",
}
_BLOCK_ROWS = 4096
_TIMEOUT_SECONDS = 1.0


@dataclasses.dataclass(frozen=True)
class _Change:
    """Change of an adapter to one tensor of the base checkpoint.

    Attributes:
      start: the base's tensor that is changed.
      parts: the adapter's tensors by role.
      scale: factor of the low-rank product and of an added bias.
      transposed: the weight is [in, out], as an embedding's or a Conv1D's.
      rows: ids of the tokens whose rows the adapter stores.
    """

    start: str
    parts: Mapping[str, str]
    scale: float = 1.0
    transposed: bool = False
    rows: tuple[int, ...] = ()

    @property
    def replacement(self) -> str | None:
        """The adapter's tensor that replaces the base's."""
        return self.parts.get("replaced", self.parts.get("base"))

    @property
    def low_rank(self) -> tuple[str, str] | None:
        """The two thin matrices, [r, in] and [out, r]."""
        return next(((self.parts[a], self.parts[b]) for a, b in _PAIRS.items() if a in self.parts), None)


def merge_adapter(base: Source, reference: str | Path) -> LoRASource:
    """Returns a checkpoint with an adapter merged into it.

    Args:
      base: the checkpoint the adapter was trained on.
      reference: the adapter's directory or Hugging Face hub id.

    Raises:
      TideError: as `LoRASource`, or there is no adapter.
    """
    return LoRASource(base, local_directory(reference, "an adapter directory"))


class LoRASource:
    """A checkpoint with an adapter merged into it; see `convert.sources.base.Source`.

    A changed tensor is computed and returned in float32; `tensors` names the dtype of the base's tensor. If the base
    ties its head to the embedding and the adapter changes only one of them, the head becomes a separate tensor.

    Args:
      base: the checkpoint the adapter was trained on.
      directory: the adapter.

    Raises:
      TideError: not a LoRA adapter, an unsupported variant, or one that does not fit the base.
    """

    rewritten = True

    def __init__(self, base: Source, directory: Path) -> None:
        self._base, self._directory = base, directory
        self._settings = _read_settings(directory)
        self._adapter = ShardedTensors(directory, ADAPTER_FILE)
        self._embeddings = self._base_names("embed.kernel")
        self.description = f"{base.description} with the adapter {directory}"
        self.config = dict(base.config)
        self.generation_config = base.generation_config
        self.ignored: dict[str, str] = getattr(base, "ignored", {})
        self.files = [*base.files, *self._adapter.files]
        self._changes = self._plan_changes()
        changed = {name: self._changed_info(name, change) for name, change in self._changes.items()}
        self.tensors: Mapping[str, TensorInfo] = {**base.tensors, **changed}

    def read(self, name: str) -> np.ndarray:
        """Reads one tensor: unchanged, or with the adapter's change in float32."""
        change = self._changes.get(name)
        if change is None:
            return self._base.read(name)
        tensor = self._base.read(change.start) if change.replacement is None else self._adapter.read(change.replacement)
        if change.parts.keys() <= {"replaced", "base"}:
            return tensor
        tensor = tensor.astype(np.float32)
        # In PEFT's order: replaced rows, then the bias, the low-rank product, and DoRA's norms.
        if change.rows:
            tensor[list(change.rows)] = self._float32(change.parts["rows"])
        if "added" in change.parts:
            tensor += change.scale * self._float32(change.parts["added"])
        if change.low_rank is not None:
            a, b = map(self._float32, change.low_rank)
            _add_product(tensor, *((a.T, b.T) if change.transposed else (b, a)), change.scale)
        if "magnitude" in change.parts:
            _set_norms(tensor, self._float32(change.parts["magnitude"]), change.transposed)
        return tensor

    def steps(self, name: str) -> np.ndarray | None:
        """As `convert.sources.base.steps_of`; None for tensors that the adapter changes."""
        return None if name in self._changes else steps_of(self._base, name)

    def write_side_files(self, directory: Path) -> None:
        """Writes the base's files, then the adapter's tokenizer and chat templates if it has any."""
        self._base.write_side_files(directory)
        if chat_templates(self._directory):
            remove_template_files(directory)  # they would override those in the adapter's tokenizer_config.json
        copy_side_files(self._directory, directory)

    def load_tokenizer(self) -> Any:
        """Returns the adapter's tokenizer if it has one, else the base's."""
        own = any((self._directory / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json"))
        return read_tokenizer(self._directory) if own else self._base.load_tokenizer()

    # ---- planning, from names and shapes ----

    def _plan_changes(self) -> dict[str, _Change]:
        heads = self._base_names("head.kernel")
        keep_tied = not heads and bool(self._settings.get("ensure_weight_tying"))
        changes: dict[str, _Change] = {}
        for target, parts in _group_by_target(self._adapter.infos).items():
            if keep_tied and self._fills(target, "head.kernel"):
                continue  # stored twice
            name, start = self._locate(target)
            changes[name] = self._plan_change(name, start, parts, target.rpartition(".")[0])
        if not heads and not keep_tied and not any(self._fills(name, "head.kernel") for name in changes):
            changes |= self._separate_head(changes)
        return changes

    def _locate(self, target: str) -> tuple[str, str]:
        """Name of the tensor that an adapter changes, and of the base's tensor that it starts from."""
        tensors = self._base.tensors
        if target in tensors:
            return target, target
        # The adapter may have been trained on a model with a head and the base saved without one, or the reverse.
        similar = [name for name in tensors if target.endswith(f".{name}") or name.endswith(f".{target}")]
        if len(similar) == 1:
            return similar[0], similar[0]
        if self._embeddings and self._fills(target, "head.kernel"):
            return target, self._embeddings[0]
        raise TideError(
            f"the adapter {self._directory} does not fit {shorten(self._base.description, 60)}: one of its tensors "
            f"belongs to {shorten(target, 70)}, which the base does not have; give the base that it was trained on"
        )

    def _plan_change(self, name: str, start: str, parts: Mapping[str, str], module: str) -> _Change:
        change = _Change(start, parts)
        for one, other in (*_PAIRS.items(), *((b, a) for a, b in _PAIRS.items())):
            if one in parts and other not in parts:
                raise TideError(f"the adapter {self._directory} has {parts[one]} without its counterpart: get it again")
        if change.low_rank is not None or "added" in parts:
            change = dataclasses.replace(change, scale=self._scale(module, change.low_rank))
        if change.low_rank is not None:
            change = dataclasses.replace(change, transposed=self._is_in_out(name, change))
            self._check_magnitude(change)
        if "rows" in parts:
            change = dataclasses.replace(change, rows=self._token_rows(module, parts["rows"], name, change))
        if "added" in parts:
            self._check_shape(parts["added"], self._base_shape(name, change))
        return change

    def _scale(self, module: str, low_rank: tuple[str, str] | None) -> float:
        settings = self._settings
        rank = whole_number("r", _module_value(settings, "rank_pattern", module, settings.get("r")), 1)
        alpha = real_number("lora_alpha", _module_value(settings, "alpha_pattern", module, settings.get("lora_alpha")))
        if low_rank is not None and (found := self._adapter.infos[low_rank[0]].shape[:1]) != (rank,):
            raise TideError(
                f"the adapter {self._directory} has {low_rank[0]} of rank {found[0] if found else 0}, expected {rank} "
                "as its adapter_config.json says"
            )
        return alpha / (rank**0.5 if settings.get("use_rslora") else rank)

    def _is_in_out(self, name: str, change: _Change) -> bool:
        assert change.low_rank is not None
        shapes = [self._adapter.infos[part].shape for part in change.low_rank]
        shape = self._base_shape(name, change)
        inner, outer = shapes[0][1:], shapes[1][:1]
        # The adapter's flag describes only the module that PEFT wrapped last.
        in_out = self._settings.get("fan_in_fan_out") or self._base.config.get("model_type") in CONV1D_TYPES
        multiply = all(len(factor) == 2 for factor in shapes) and shapes[0][0] == shapes[1][1]
        embedding = "embedding_a" in change.parts
        if multiply and not embedding and shape == outer + inner and not (in_out and inner == outer):
            return False
        if multiply and shape == inner + outer and (embedding or in_out):
            return True
        raise TideError(
            f"the adapter {self._directory} does not fit {self._base.description}: {change.low_rank[0]} "
            f"{list(shapes[0])} and its pair {list(shapes[1])} do not multiply to {name} {list(shape)}; "
            "give the base the adapter was trained on"
        )

    def _check_magnitude(self, change: _Change) -> None:
        assert change.low_rank is not None
        _, b = change.low_rank
        if "magnitude" in change.parts:
            self._check_shape(change.parts["magnitude"], self._adapter.infos[b].shape[:1])
        elif self._settings.get("use_dora"):
            raise TideError(
                f"the adapter {self._directory} uses DoRA and lacks the magnitude vector of {b}: get it again"
            )

    def _token_rows(self, module: str, part: str, name: str, change: _Change) -> tuple[int, ...]:
        indices = self._settings.get("trainable_token_indices")
        if isinstance(indices, dict):
            indices = next((found for key, found in indices.items() if f".{module}".endswith(f".{key}")), None)
        shape = self._base_shape(name, change)
        if not isinstance(indices, list) or not all(isinstance(i, int) and 0 <= i < shape[0] for i in indices):
            raise TideError(
                f"the adapter {self._directory} has {part}, expected token ids below {shape[0]} for it in "
                "trainable_token_indices of its adapter_config.json"
            )
        self._check_shape(part, (len(indices), *shape[1:]))
        return tuple(indices)

    def _base_shape(self, name: str, change: _Change) -> tuple[int, ...]:
        """Shape of a tensor before the change. The adapter's embedding or head may have more tokens than the base's."""
        base = self._base.tensors[change.start].shape
        if change.replacement is None:
            return base
        found = self._adapter.infos[change.replacement].shape
        if found != base and not (self._has_token_axis(name) and found[1:] == base[1:]):
            self._check_shape(change.replacement, base)
        return found

    def _check_shape(self, part: str, expected: tuple[int, ...]) -> None:
        if (found := self._adapter.infos[part].shape) != expected:
            raise TideError(
                f"the adapter {self._directory} does not fit {self._base.description}: {part} has shape {list(found)}, "
                f"expected {list(expected)}; give the base the adapter was trained on"
            )

    def _changed_info(self, name: str, change: _Change) -> TensorInfo:
        shape = self._base_shape(name, change)
        if self._has_token_axis(name) and "vocab_size" in self.config:
            self.config["vocab_size"] = shape[0]
        return TensorInfo(shape, self._base.tensors[change.start].dtype)

    def _separate_head(self, changes: Mapping[str, _Change]) -> dict[str, _Change]:
        """Separates the head of a base that ties it to the embedding, if the adapter changes only the embedding.

        The new head keeps the base's embedding. With a new vocabulary, or if single tokens were trained, both stay
        tied.
        """
        embedding = next((changes[name] for name in self._embeddings if name in changes), None)
        if embedding is None or (embedding.low_rank is None and "replaced" not in embedding.parts):
            return {}
        if self._base_shape(self._embeddings[0], embedding) != self._base.tensors[embedding.start].shape:
            return {}
        patterns = (pattern for pattern in self._patterns("head.kernel"))
        # A rule's pattern names one tensor, apart from optional groups.
        names = (re.sub(r"\(\?:.*?\)\?", "", pattern).replace("\\", "") for pattern in patterns)
        head = next((name for name in names if self._fills(name, "head.kernel")), None)
        if head is None:
            raise TideError(f"the adapter {self._directory} changes an embedding but not its tied head: merge it first")
        return {head: _Change(embedding.start, {k: v for k, v in embedding.parts.items() if k == "base"})}

    def _has_token_axis(self, name: str) -> bool:
        return self._fills(name, "embed.kernel") or self._fills(name, "head.kernel")

    def _base_names(self, path: str) -> list[str]:
        """The base's tensors that fill a parameter."""
        return [name for name in self._base.tensors if self._fills(name, path)]

    def _fills(self, name: str, path: str) -> bool:
        return any(re.fullmatch(pattern, name) for pattern in self._patterns(path))

    def _patterns(self, path: str) -> list[str]:
        family = FAMILIES.get(self._base.config.get("model_type", ""))
        if family is None:
            return [_COMMON_NAME_PATTERNS[path]]
        return [rule.pattern for rule in family.rules if any(target.path == path for target in rule.targets)]

    def _float32(self, part: str) -> np.ndarray:
        return self._adapter.read(part).astype(np.float32, copy=False)


def _read_settings(directory: Path) -> dict[str, Any]:
    """Reads adapter_config.json of a LoRA adapter. Raises TideError for other adapters and unsupported variants."""
    path = directory / ADAPTER_CONFIG
    if not path.is_file():
        raise TideError(f"{directory} has no {ADAPTER_CONFIG}: expected a LoRA adapter as PEFT saves it")
    settings = read_json(path)
    if (kind := settings.get("peft_type")) != "LORA":
        found = f"an adapter of type {shorten(kind)!r}"
        raise TideError(f"{directory} is {found}, only LORA is supported: merge it with PEFT first")
    if (start := settings.get("init_lora_weights")) not in _SUPPORTED_STARTS:
        raise TideError(
            f"{directory} was trained from init_lora_weights={shorten(start)!r}, which changes the base's weights: "
            "merge it with PEFT first, or save it with path_initial_model_for_weight_conversion"
        )
    if unknown := sorted(key for key, value in settings.items() if value and key not in _READ_KEYS + _TRAINING_KEYS):
        given = shorten(", ".join(unknown), 120)
        raise TideError(f"{directory} uses {given}, which is not supported: merge it with PEFT first")
    return settings


def _group_by_target(names: Sequence[str] | Mapping[str, TensorInfo]) -> dict[str, dict[str, str]]:
    """Groups the adapter's tensors by the tensor they change, under the model's names, and by role."""
    targets: dict[str, dict[str, str]] = {}
    for stored in names:
        name = stored.removeprefix(_PREFIX)
        target, role = name, "replaced"
        for suffix, suffix_role in _ROLES.items():
            if name.endswith(f".{suffix}"):
                target, role = f"{name.removesuffix(suffix)}weight", suffix_role
        if name.endswith(".lora_B.bias"):
            target, role = f"{name.removesuffix('lora_B.bias')}bias", "added"
        target = target.replace(".base_layer.", ".")  # a replaced bias keeps its wrapper's name
        targets.setdefault(target, {})[role] = stored
    return targets


def _module_value(settings: Mapping[str, Any], key: str, module: str, default: Any) -> Any:
    """A module's own value: that of the first pattern that matches its name or the end of it, as in PEFT."""
    patterns = settings.get(key) or {}
    try:
        # Patterns are untrusted and may backtrack without end; `re` has no time limit.
        matches = (
            value for p, value in patterns.items() if regex.match(rf"(.*\.)?({p})$", module, timeout=_TIMEOUT_SECONDS)
        )
        return next(matches, default)
    except (regex.error, AttributeError, TypeError, TimeoutError, RecursionError, OverflowError) as error:
        raise TideError(f"adapter_config.json has an invalid {key} ({shorten(error)}): correct it") from error


def _add_product(tensor: np.ndarray, left: np.ndarray, right: np.ndarray, scale: float) -> None:
    """Computes ``tensor += scale * left @ right``, some rows at a time."""
    for start in range(0, len(tensor), _BLOCK_ROWS):
        tensor[start : start + _BLOCK_ROWS] += (np.float32(scale) * left[start : start + _BLOCK_ROWS]) @ right


def _set_norms(tensor: np.ndarray, magnitude: np.ndarray, transposed: bool) -> None:
    """Rescales the weights of each output to the norms in `magnitude`."""
    by_output = tensor.T if transposed else tensor
    norms = np.sqrt(np.einsum("oi,oi->o", by_output, by_output))
    by_output *= (magnitude / norms)[:, None]
