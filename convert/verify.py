"""Verifies a conversion: compares logits with transformers' own model of the same checkpoint."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from convert.quiet import quiet_transformers
from convert.sources.base import Source
from tide_jax.errors import TideError
from tide_jax.json_files import read_json
from tide_jax.model.architecture import DecoderConfig
from tide_jax.model.decoder import Decoder
from tide_jax.model.rounding import Weights

TOLERANCE = 2e-4
INT8_TOLERANCE, INT8_DIVERGENCE = 0.1, 0.2
"""Bounds for 8-bit weights: the median over tokens of the largest logit difference, as a share of the logits' range,
and the mean divergence in nats. Rounding moves tiny random models by 0.01 to 0.03 and by 0.001 to 0.1, most where
experts are chosen. One matrix with shifted rows moves them by at least 0.16 and 0.4, unless it belongs to a single
expert; that case is found by `convert.verify_weights`. The largest difference over all tokens can't serve as a bound: a
token whose experts change may differ by half of the range."""
_SHORTEST_ROW, _LONGEST_ROW = 64, 256
_LENGTH_DEPENDENT_ROPES = ("dynamic", "longrope")  # their rotary frequencies depend on the longest row


@dataclasses.dataclass(frozen=True)
class Verification:
    """Difference between the logits and transformers' with the same rounded weights, both computed in float32.

    For 8-bit weights the reference has the unrounded floats.

    Attributes:
      max_difference: largest absolute difference of any logit.
      logit_range: largest minus smallest of transformers' logits.
      relative: `max_difference` over `logit_range`.
      tokens: number of tokens compared.
      row_length: tokens of the longest row.
      typical: 8-bit weights only, else None: median over tokens of the largest logit difference, as a share of the
        range.
      divergence: 8-bit weights only, else None: mean KL divergence from transformers' predictions, in nats.
      agreement: 8-bit weights only, else None: share of tokens whose likeliest next token is transformers'.
    """

    max_difference: float
    logit_range: float
    relative: float
    tokens: int
    row_length: int
    typical: float | None = None
    divergence: float | None = None
    agreement: float | None = None


def compare_logits(found: np.ndarray, expected: np.ndarray, row_length: int, weights: Weights) -> Verification:
    """Compares logits [N, V] with the reference's; `weights` are the model's."""
    difference, logit_range = float(np.abs(found - expected).max()), float(expected.max() - expected.min())
    measures = {}
    if weights == "int8":
        measures["typical"] = float(np.median(np.abs(found - expected).max(axis=1))) / logit_range
        log_p, log_q = (_log_softmax(logits) for logits in (expected, found))
        measures["divergence"] = float(np.mean(np.sum(np.exp(log_p) * (log_p - log_q), axis=1)))
        measures["agreement"] = float(np.mean(found.argmax(axis=1) == expected.argmax(axis=1)))
    return Verification(difference, logit_range, difference / logit_range, len(found), row_length, **measures)


def describe_excess(proof: Verification) -> str | None:
    """Describes by how much a model exceeds its bounds; None if it is within them."""
    if proof.typical is None or proof.divergence is None:
        within = proof.relative <= TOLERANCE
        return None if within else f"by {proof.relative:.1e} of their range, expected at most {TOLERANCE:.0e}"
    if not proof.typical <= INT8_TOLERANCE:
        return f"by {proof.typical:.1e} of their range for half of the tokens, expected at most {INT8_TOLERANCE:.0e}"
    if not proof.divergence <= INT8_DIVERGENCE:
        return f"by a mean divergence of {proof.divergence:.1e} nats, expected at most {INT8_DIVERGENCE:.0e}"
    return None


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def require_torch() -> None:
    """Raises TideError if the packages that verification needs are missing."""
    missing = [name for name in ("torch", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise TideError(f"--verify needs transformers' PyTorch models: run `pip install {' '.join(missing)}`")


def verify_conversion(source: Source, model: Decoder, stored_dtype: np.dtype) -> Verification:
    """Compares logits on random tokens, in two rows of unequal length.

    Args:
      source: the source that was converted.
      model: the converted model, loaded in float32.
      stored_dtype: dtype of the stored weights. The reference's weights are rounded to it too, so that one tolerance
        fits every dtype.

    Raises:
      TideError: the logits differ by more than `TOLERANCE` of their range (for 8-bit weights by more than
        `INT8_TOLERANCE` or `INT8_DIVERGENCE`), or prove nothing: not finite, or the same for all tokens.
    """
    tokens, mask = _random_batch(model.config)
    as_one_batch = any(kind.rope and kind.rope.kind in _LENGTH_DEPENDENT_ROPES for kind in model.config.attention_types)
    expected = _reference_logits(source, stored_dtype, tokens, mask, as_one_batch)
    positions = np.where(mask, np.cumsum(mask, axis=1) - 1, -1)
    found = np.asarray(model(jnp.asarray(tokens, jnp.int32), jnp.asarray(positions, jnp.int32)))[mask]
    check_spread(source.description, expected)
    proof = compare_logits(found, expected, mask.shape[1], model.weights)
    if (excess := describe_excess(proof)) is not None:
        raise TideError(
            f"the converted model's logits differ from transformers' {excess}: nothing was written, please report the "
            "model"
        )
    return proof


def check_spread(description: str, logits: np.ndarray) -> None:
    """Raises TideError if a reference's logits [N, V] could not reveal a difference; `description` names the model."""
    if not np.isfinite(logits).all():
        raise TideError(
            f"the reference's logits of {description} are NaN or infinite: nothing was written; the checkpoint is "
            "damaged, download or copy it again"
        )
    spread, largest = float((logits.max(axis=1) - logits.min(axis=1)).max()), float(np.abs(logits).max())
    if spread <= 1e-6 * largest:  # within rounding; also catches all zeros
        raise TideError(
            f"the reference's logits of {description} are the same for every token, which proves nothing: nothing was "
            "written, expected the weights of a trained model"
        )


def _random_batch(config: DecoderConfig) -> tuple[np.ndarray, np.ndarray]:
    """Random tokens and the mask of real ones: one full row, and one row padded on the left."""
    length = min(_row_length(config), config.max_positions)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (2, length))
    if config.pad_token_id is not None:  # some families skip the padding token when they count positions
        tokens[tokens == config.pad_token_id] = (config.pad_token_id + 1) % config.vocab_size
    mask = np.ones((2, length), bool)
    mask[1, : length // 3] = False
    return tokens, mask


def _row_length(config: DecoderConfig) -> int:
    """A row length beyond small attention windows and small original rotary lengths."""
    windows = [kind.window or 0 for kind in config.attention_types]
    original_lengths = [kind.rope.original_max_positions for kind in config.attention_types if kind.rope]
    reachable = [length for length in windows + original_lengths if length < _LONGEST_ROW]
    return min(_LONGEST_ROW, max(_SHORTEST_ROW, 2 * max(reachable, default=0)))


def _reference_logits(
    source: Source, stored_dtype: np.dtype, tokens: np.ndarray, mask: np.ndarray, as_one_batch: bool
) -> np.ndarray:
    """Logits of the real tokens [N, V]: each row alone, which suits every family, or `as_one_batch` with padding."""
    import torch

    with quiet_transformers():
        reference = reference_model(source, rounded=stored_dtype != np.float32).eval()
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.copy_(parameter.to(getattr(torch, stored_dtype.name)))
        if not as_one_batch:
            rows = [torch.tensor(row[real])[None] for row, real in zip(tokens, mask, strict=True)]
            return np.concatenate([reference(input_ids=row).logits[0].float().numpy() for row in rows])
        attention_mask = torch.tensor(mask.astype(np.int64))
        positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)
        output = reference(input_ids=torch.tensor(tokens), attention_mask=attention_mask, position_ids=positions)
    return output.logits.float().numpy()[mask]


def reference_model(source: Source, *, rounded: bool = False) -> Any:
    """Loads the checkpoint as a float32 PyTorch model. Raises TideError if transformers cannot load it.

    Weights that were dequantised or have a merged adapter are passed to the reference as we read them. In that case the
    comparison verifies the model, but not the reading. The same is done for adapters of shared blocks if weights are
    `rounded`: rounding a sum differs from rounding its parts.
    """
    import torch

    if rounded and (untied := getattr(source, "untied", None)) is not None and (read := untied()) is not None:
        return _model_of(*read)
    source = getattr(source, "whole", source)
    if getattr(source, "rewritten", False):
        return _model_from_read_weights(source)
    file = source.files[0]
    gguf = {"gguf_file": file.name} if file.suffix == ".gguf" else {}
    try:
        return _reference_class(file.parent).from_pretrained(file.parent, dtype=torch.float32, **gguf)
    except (OSError, ValueError, RuntimeError, ImportError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise TideError(f"transformers cannot load {source.description} for the comparison: {reason}") from error


def _model_from_read_weights(source: Source) -> Any:
    return _model_of(source.config, {name: source.read(name) for name in source.tensors})


def _model_of(settings: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> Any:
    import torch
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

    weights = {name: torch.tensor(tensor.astype(np.float32)) for name, tensor in tensors.items()}
    config = CONFIG_MAPPING[settings["model_type"]].from_dict(dict(settings))
    reference: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    return reference.from_pretrained(None, config=config, state_dict=weights, dtype=torch.float32)


def _reference_class(directory: Path) -> Any:
    """The class that `architectures` names if the model type is not a causal language model (a multimodal model)."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    config = read_json(directory / "config.json") if (directory / "config.json").is_file() else {}
    names = [name for name in config.get("architectures") or [] if hasattr(transformers, name)]
    if config.get("model_type") in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or not names:
        return transformers.AutoModelForCausalLM
    return getattr(transformers, names[0])
