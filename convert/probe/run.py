"""Probes models whose type is in no table: infers what they compute from recorded numbers, with logits as the proof.

The model's own code (transformers', or the checkpoint's) runs on one row of random tokens, and every linear map, norm
and table in it is recorded. Then, layer by layer, the flags of each part are inferred: the candidate wins whose output
equals the next recorded array. The result is a decoder configuration and a weight map. They are accepted only if the
resulting decoder gives the model's logits.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np

from convert.probe.decoder import context_length, decoder_of, places_of
from convert.probe.layer import find_layer
from convert.probe.names import weight_map
from convert.probe.outside import find_embedding, find_head
from convert.probe.record import record
from convert.probe.reference import Reference, load_reference
from convert.probe.rules import to_json
from convert.probe.trace import MATCH, Trace, distance
from convert.sources.base import Source
from convert.verify import TOLERANCE, Verification, check_spread, compare_logits, describe_excess
from convert.weights.rules import Rule, plan_conversion
from tide_jax.errors import TideError
from tide_jax.model.architecture import DecoderConfig
from tide_jax.model.decoder import Decoder, from_parameters

logger = logging.getLogger(__name__)
_SHORTEST_ROW, _LONGEST_ROW = 64, 256


@dataclasses.dataclass(frozen=True)
class ProbeResult:
    """Result of a probe.

    Attributes:
      config: the architecture.
      rules: the weight map.
      report: JSON-ready: whose code it was measured against ("measured_against"), the difference of the logits
        ("verification"), the contents of a table entry ("flags", "weight_map"), and settings that only config.json
        could tell ("assumed").
    """

    config: DecoderConfig
    rules: tuple[Rule, ...]
    report: dict[str, Any]


def probe(source: Source, *, trust_remote_code: bool = False) -> ProbeResult:
    """Finds out what a checkpoint computes whose model type is in no table.

    Needs torch, and memory for the model in float32 twice.

    Args:
      source: a Hugging Face directory.
      trust_remote_code: run the Python code in the checkpoint, if transformers has none for it.

    Raises:
      TideError: there is no code to measure against, or it is not trusted; or no candidate matches the model's numbers.
        Then the message names the first layer and part that differs, and by how much.
    """
    reference = load_reference(source, trust_remote_code=trust_remote_code, small_windows=True)
    try:
        probed = _propose(source, record(reference))
        # Windows were shrunk to be visible in a short row: prove the result against the true windows.
        if reference.windows:
            reference = load_reference(source, trust_remote_code=trust_remote_code, small_windows=False)
        model = from_parameters(probed.config, _assemble_parameters(source, probed), dtype=jnp.dtype(jnp.float32))
        proof = _compare_on_random_tokens(reference, model)
        if not proof.relative <= TOLERANCE:
            raise TideError(f"{_difference_message(proof)}: {_describe_first_difference(reference, model)}")
    except Exception as error:  # the search may fail in any way on an unknown model
        reason = " ".join(str(error).split()) or "no reason given"
        kind = "" if isinstance(error, TideError) else f"{type(error).__name__}: "
        raise TideError(f"{source.description} was probed and cannot be converted: {kind}{reason}") from error
    report = probed.report | {"verification": dataclasses.asdict(proof)}
    measured, flags = report["measured_against"], report["flags"]
    logger.info("%s is in no table; measured against %s, its flags are %s", source.description, measured, flags)
    return dataclasses.replace(probed, report=report)


def verify_probed_model(
    source: Source, model: Decoder, stored_dtype: np.dtype, *, trust_remote_code: bool = False
) -> Verification:
    """Compares a converted model's logits with those of the code it was probed against.

    Args:
      source: the source that was converted.
      model: the converted model, loaded in float32.
      stored_dtype: dtype of the stored weights; the reference's weights are rounded to it too.

    Raises:
      TideError: as `convert.verify.verify_conversion`.
    """
    import torch

    reference = load_reference(source, trust_remote_code=trust_remote_code, small_windows=False)
    with torch.no_grad():
        for parameter in reference.model.parameters():
            parameter.copy_(parameter.to(getattr(torch, stored_dtype.name)))
    proof = _compare_on_random_tokens(reference, model)
    if (excess := describe_excess(proof)) is not None:
        raise TideError(
            f"logits differ {excess}, over {proof.tokens} tokens: nothing was written, please report the model"
        )
    return proof


def _propose(source: Source, trace: Trace) -> ProbeResult:
    """Finds the configuration and the weight map that reproduce every recorded array."""
    embedding = find_embedding(trace)
    layers = []
    for index in range(len(trace.layers)):
        layers.append(find_layer(trace, index, layers))
    head = find_head(trace)
    config = decoder_of(trace, str(source.config.get("model_type")), embedding, layers, head)
    places = places_of(trace, config, embedding, layers, head)
    rules = weight_map(source, places)
    report: dict[str, Any] = {
        "measured_against": trace.reference.origin,
        "flags": _non_default_flags(config),
        "weight_map": to_json(rules),
        "assumed": _assumptions(config, context_length(trace, embedding)[1]),
    }
    return ProbeResult(config, rules, report)


def _assumptions(config: DecoderConfig, context_known: bool) -> list[str]:
    """Settings that short rows of ordinary numbers can't reveal, taken from the configuration."""
    assumed = [] if context_known else [f"max_positions={config.max_positions}: the configuration does not say"]
    for name in ("activation_limit", "clip_qkv"):
        if (value := getattr(config, name)) is not None:
            assumed.append(f"{name}={value}: numbers may not have reached it")
    kinds = {kind.rope.kind for kind in config.attention_types if kind.rope} & {"dynamic", "longrope"}
    return assumed + [f"{kind} rotary embeddings of longer texts" for kind in sorted(kinds)]


def _non_default_flags(config: DecoderConfig) -> dict[str, Any]:
    """Flags that differ from their default."""
    values = config.to_dict()
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    return {name: value for name, value in values.items() if getattr(config, name) != defaults[name]}


def _compare_on_random_tokens(reference: Reference, model: Decoder) -> Verification:
    """Compares logits on random tokens: a long row, and a shorter one that the decoder gets padded on the left."""
    config = model.config
    windows = [2 * kind.window for kind in config.attention_types if kind.window and 2 * kind.window <= _LONGEST_ROW]
    length = min(max([_SHORTEST_ROW, *windows]), config.max_positions)
    start = length // 3
    tokens = np.random.default_rng(1).integers(0, config.vocab_size, (2, length))
    positions = np.stack([np.arange(length), np.maximum(np.arange(length) - start, -1)])
    out = np.asarray(model(jnp.asarray(tokens, jnp.int32), jnp.asarray(positions, jnp.int32)))
    found = np.concatenate([out[0], out[1, start:]])
    reference.logits(tokens[0, :2])  # dynamic rotary embeddings remember the longest row until a short one resets them
    expected = np.concatenate([reference.logits(tokens[0]), reference.logits(tokens[1, start:])])
    check_spread("the probed model", expected)
    return compare_logits(found, expected, length, model.weights)


def _difference_message(proof: Verification) -> str:
    return (
        f"logits differ by {proof.relative:.1e} of their range over {proof.tokens} tokens, expected at most "
        f"{TOLERANCE:.0e}"
    )


def _describe_first_difference(reference: Reference, model: Decoder) -> str:
    """Describes the first part of the decoder whose output differs from the reference's."""
    trace = record(reference)
    positions = jnp.arange(len(trace.tokens), dtype=jnp.int32)[None]
    x = model.embed_tokens(jnp.asarray(trace.tokens, jnp.int32)[None], positions)
    streams, contexts = [x], model.contexts(positions, None)
    for layer in model.layers:
        x, _ = layer(x, contexts, None)
        streams.append(x)
    calls = [trace.find_call(name) for name in trace.layers]
    expected = [calls[0].inputs, *(call.output for call in calls), trace.logits]
    found = [*streams, model.logits(model.final_norm(x))]
    names = ["the embedding", *(f"layer {i}" for i in range(len(calls))), "the head"]
    for name, a, b in zip(names, found, expected, strict=True):
        if (error := distance(np.asarray(a)[0], b)) > MATCH:
            return f"{name} diverges first, by {error:.1e} of the range"
    return f"no single part diverges on {len(trace.tokens)} tokens"


def _assemble_parameters(source: Source, probed: ProbeResult) -> Iterator[tuple[str, np.ndarray]]:
    """Yields each parameter in float32, assembled from its pieces."""
    plan = plan_conversion(source.tensors, probed.rules, probed.config)
    for path, pieces in plan.by_path().items():
        parameter = np.empty(plan.shapes[path], np.float32)
        for piece in pieces:
            parameter[piece.slot] = piece.take(source.read(piece.source), probed.config)
        yield path, parameter
