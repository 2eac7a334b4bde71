"""Compares a converted checkpoint with transformers' model of it: full depth, cache, padding, text and exits.

`convert.verify` compares one batch of a large model; this module compares every path of a small one.
"""

from __future__ import annotations

import dataclasses
import functools
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from convert.conversion import convert
from convert.parity.reference import NEW_TOKENS, WHOLE_ROWS, Batch, Reference, random_batch
from convert.verify import TOLERANCE
from tide_jax.exits.depth import run_depth
from tide_jax.exits.exits import Exits
from tide_jax.exits.queue import init_cache
from tide_jax.exits.router import Routers
from tide_jax.model.attention.span import KeyValue
from tide_jax.model.cache import KVCache, advance, empty_cache
from tide_jax.model.decoder import Decoder
from tide_jax.model.files.checkpoint import load
from tide_jax.model.layers import DecoderLayer
from tide_jax.model.memory import Memory, Rows, by_part
from tide_jax.model.recurrent.mixer import State
from tide_jax.model.recurrent.order import TokenOrder
from tide_jax.testing import constant_routers

_MIN_LOGIT_RANGE = 2.0
_PATHS = ("prefill", "padded", "decode", "forced_exit", "mixed_exit")


@dataclasses.dataclass(frozen=True)
class ParityReport:
    """Differences between a converted model and transformers' in float32, each as a share of the logit range.

    Attributes:
      model_type: the checkpoint's model type.
      prefill: rows without padding, in one pass.
      padded: rows padded on the left, in one pass and token by token, against transformers without padding.
      decode: rows without padding, token by token with exits enabled that no token takes, against transformers' cache.
      forced_exit: token by token; every token but the first exits at the middle layer. Against transformers' state
        there.
      mixed_exit: token by token; some tokens exit at the middle layer. Against a plain walk over tokens and layers.
      greedy_tokens: leading tokens, of `NEW_TOKENS` after a prompt, that equal transformers' greedy text in every row.
      logit_range: largest minus smallest logit of transformers.
    """

    model_type: str
    prefill: float
    padded: float
    decode: float
    forced_exit: float
    mixed_exit: float
    greedy_tokens: int
    logit_range: float

    @property
    def relative(self) -> float:
        """The largest of all differences."""
        return float(np.max([getattr(self, path) for path in _PATHS]))

    @property
    def problems(self) -> tuple[str, ...]:
        """What is not equal, a line each; nothing for a right conversion."""
        differences = {path: getattr(self, path) for path in _PATHS}
        found = [
            f"{path}: logits differ by {difference:.1e} of their range"
            for path, difference in differences.items()
            if not difference <= TOLERANCE
        ]
        if self.greedy_tokens != NEW_TOKENS:
            found.append(f"greedy: {self.greedy_tokens} of {NEW_TOKENS} tokens are equal")
        if not self.logit_range >= _MIN_LOGIT_RANGE:
            found.append(f"the logits hardly differ, by {self.logit_range:.1e}: nothing was tested")
        return tuple(found)


def measure_parity(checkpoint: str | Path) -> ParityReport:
    """Converts a checkpoint into a temporary directory and compares all paths with transformers' model of it.

    Args:
      checkpoint: a Hugging Face directory with a small model; see `convert.parity.tiny.save_tiny`.

    Raises:
      TideError: the checkpoint cannot be converted.
    """
    with tempfile.TemporaryDirectory() as directory:
        model_type = convert(checkpoint, Path(directory) / "converted", dtype="float32").model_type
        model = load(Path(directory) / "converted", "float32")
    try:
        return _compare(model_type, model, Reference(checkpoint, as_one_batch=_has_length_dependent_ropes(model)))
    finally:
        for program in _PROGRAMS:
            program.clear_cache()  # can't be reused for the next model, and takes 30 MB


def _compare(model_type: str, model: Decoder, reference: Reference) -> ParityReport:
    batch = random_batch(model.config.vocab_size)
    no_exits, all_exits, random_exits = np.zeros_like(batch.mask), np.ones_like(batch.mask), _random_exits(batch)
    expected, states = reference.logits_and_states(batch, _middle_layer(model))
    at_middle = np.where((batch.positions >= 1)[..., None], _run_head(model, jnp.asarray(states)), expected)
    spread = float(np.ptp(expected[batch.mask]))
    prefill, text = _run_prefill(model, batch)
    decode, steps = _run_steps(model, batch, no_exits), reference.steps(batch)

    def relative(found: np.ndarray, expected_logits: np.ndarray, where: np.ndarray = batch.mask) -> float:
        return float(np.abs(found - expected_logits)[where].max()) / max(spread, 1e-30)

    def whole(found: np.ndarray, expected_logits: np.ndarray) -> float:
        return relative(found[:WHOLE_ROWS], expected_logits[:WHOLE_ROWS], batch.mask[:WHOLE_ROWS])

    def padded(found: np.ndarray) -> float:
        return relative(found[WHOLE_ROWS:], expected[WHOLE_ROWS:], batch.mask[WHOLE_ROWS:])

    # If frequencies depend on the length, so do cached keys: one pass and many passes differ by design.
    one_pass = _has_length_dependent_ropes(model)
    forced = (
        _run_pass(model, batch, _empty_cache(model, batch), all_exits)[0]
        if one_pass
        else _run_steps(model, batch, all_exits)
    )
    return ParityReport(
        model_type=model_type,
        prefill=whole(prefill, expected),
        padded=padded(prefill) if one_pass else max(padded(prefill), padded(decode)),
        decode=whole(decode, expected if steps is None else steps),
        forced_exit=relative(forced, at_middle),
        mixed_exit=relative(_run_steps(model, batch, random_exits), _walk_layers(model, batch, random_exits)),
        greedy_tokens=_count_equal_tokens(text, reference.greedy(batch)),
        logit_range=spread,
    )


def _has_length_dependent_ropes(model: Decoder) -> bool:
    """Whether rotary frequencies depend on the length of the text."""
    ropes = [kind.rope for kind in model.config.attention_types if kind.rope is not None]
    return any(rope.kind in ("dynamic", "longrope") for rope in ropes)


def _random_exits(batch: Batch) -> np.ndarray:
    """A random choice of tokens. In every third column all rows exit, so that deep layers are skipped."""
    chosen = np.random.default_rng(11).integers(0, 2, batch.mask.shape).astype(bool)
    chosen[:, ::3] = True
    return chosen


def _count_equal_tokens(found: np.ndarray, expected: np.ndarray) -> int:
    """Leading columns that are equal in all of the expected rows."""
    return int(np.cumprod((found[: len(expected)] == expected).all(axis=0)).sum())


# Each program runs a few times on small arrays: most of the time is compilation.
_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@_jit
def _run_forward(model: Decoder, tokens: Array, positions: Array) -> tuple[Float[Array, "B T V"], KeyValue]:
    x, rows = model.run_layers(tokens, positions, None)
    return model.logits(model.final_norm(x)), rows


@_jit
def _run_depth(
    model: Decoder, tokens: Array, positions: Array, cache: KVCache, routers: Routers, may_exit: Bool[Array, "B T"]
) -> tuple[Float[Array, "B T V"], Int[Array, "B T"], KVCache]:
    """Logits and exit layers when every token that may exit does so at the first exit point."""
    out = run_depth(model, tokens, positions, cache, Exits.uniform(routers, 0.0), may_exit=may_exit)
    return model.logits(out.states), out.exit_layers, cache.append(out.new, positions, model.layers)


@_jit
def _run_head(model: Decoder, states: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
    return model.logits(model.final_norm(model.residual(states)))


def _run_prefill(model: Decoder, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
    """Logits of one pass at full depth, and `NEW_TOKENS` greedy tokens after each row, [B, NEW_TOKENS]."""
    logits, rows = _run_forward(model, jnp.asarray(batch.tokens), jnp.asarray(batch.positions))
    cache = _empty_cache(model, batch).append(rows, jnp.asarray(batch.positions), model.layers)
    text = [np.argmax(logits[:, -1:], axis=-1).astype(np.int32)]
    for n in range(1, NEW_TOKENS):
        ones = np.ones_like(text[-1], bool)
        out, cache = _run_pass(model, Batch(text[-1], batch.positions[:, -1:] + np.int32(n), ones), cache, ~ones)
        text.append(np.argmax(out, axis=-1).astype(np.int32))
    return np.asarray(logits), np.concatenate(text, axis=1)


def _run_steps(model: Decoder, batch: Batch, may_exit: np.ndarray) -> np.ndarray:
    """Logits [B, T, V], one token at a time through the cache; tokens that may exit do so at the middle layer."""
    cache, logits = _empty_cache(model, batch), []
    for t in range(batch.tokens.shape[1]):
        out, cache = _run_pass(model, batch.column(t), cache, may_exit[:, t : t + 1])
        logits.append(out)
    return np.concatenate(logits, axis=1)


def _run_pass(model: Decoder, batch: Batch, cache: KVCache, may_exit: np.ndarray) -> tuple[np.ndarray, KVCache]:
    """Logits [B, T, V] of one pass, NaN for tokens that exited at another than the middle layer; and the new cache."""
    middle = _middle_layer(model)
    routers = constant_routers(model.config, interval=middle + 1)
    arrays = (jnp.asarray(a) for a in (batch.tokens, batch.positions))
    logits, layers, cache = _run_depth(model, *arrays, cache, routers, jnp.asarray(may_exit))
    exits = may_exit & (batch.positions >= 1)
    expected = np.where(batch.mask, np.where(exits, middle, model.config.num_layers - 1), -1)
    return np.where((np.asarray(layers) == expected)[..., None], np.asarray(logits), np.nan), cache


def _empty_cache(model: Decoder, batch: Batch) -> KVCache:
    rows, length = batch.tokens.shape
    return init_cache(model.config, rows, length + NEW_TOKENS, jnp.dtype(jnp.float32))


def _middle_layer(model: Decoder) -> int:
    return (model.config.num_layers - 1) // 2


def _walk_layers(model: Decoder, batch: Batch, may_exit: np.ndarray) -> np.ndarray:
    """Computes the logits of `_run_steps`, one token and one layer at a time.

    It has no groups and no cache: keys and values are in Python lists. A token that exited keeps its state, and deeper
    layers only compute its keys and values.
    """
    rows, length = batch.tokens.shape
    # Full length from the start, so that shapes never change.
    memory: list[Any] = [_start(memory, length) for memory in empty_cache(model.config, rows, 1, jnp.float32).layers]
    exits = may_exit & (batch.positions >= 1)
    states = []
    for t in range(length):
        now = batch.column(t)
        cached_positions = np.where(np.arange(length) < t, batch.positions, np.int32(-1))
        x, contexts = _embed(model, *(jnp.asarray(a) for a in (now.tokens, now.positions, cached_positions)))
        for i, layer in enumerate(model.layers):
            exited = exits[:, t] & (i > _middle_layer(model))
            cached = by_part(memory[i], slots=_joined, state=lambda state: state)
            x, new = _run_layer(layer, x, contexts, cached, jnp.asarray(exited))
            take_in = functools.partial(_take_in, layer, real=jnp.asarray(now.positions >= 0))
            memory[i] = by_part(memory[i], new, slots=functools.partial(_replaced, at=t), state=take_in)
        states.append(x)
    return np.asarray(_run_head(model, jnp.concatenate(states, axis=1)))


class _CachedPositions(NamedTuple):
    """The part of a cache that `Decoder.contexts` reads."""

    positions: Int[Array, "B S"]


@_jit
def _embed(
    model: Decoder, tokens: Array, positions: Array, cached_positions: Array
) -> tuple[Float[Array, "B 1 D"], Any]:
    """The states before the first layer, and the contexts with which layers attend to `cached_positions`."""
    slots: Any = _CachedPositions(cached_positions)
    return model.embed_tokens(tokens, positions), model.contexts(positions, slots)


@_jit
def _run_layer(
    layer: DecoderLayer, x: Array, contexts: Any, cached: Any, exited: Bool[Array, " B"]
) -> tuple[Float[Array, "B 1 D"], Rows]:
    """Runs a layer on one token of each row. Rows that exited keep the residual stream, and the layer keeps that."""
    y, new = layer(x, contexts, cached)

    def choose(a: Array, b: Array) -> Array:
        return jnp.where(exited.reshape(-1, *(1,) * (a.ndim - 1)), a, b)

    new = jax.tree.map(choose, layer.project_rows(x, contexts), new)
    return choose(x, y), new


@_jit
def _take_in(layer: DecoderLayer, state: State, inputs: Array, real: Bool[Array, "B 1"]) -> State:
    """A recurrent layer's state after one more token of each row that has one."""
    return advance(layer, state, inputs, TokenOrder.of(real))


def _start(memory: Memory, length: int) -> Any:
    """A layer's memory before the first token, with a list of each token's keys and values."""
    return by_part(memory, slots=lambda kv: [KeyValue(*(a[:, :, :1] for a in kv))] * length, state=lambda state: state)


def _joined(tokens: list[KeyValue]) -> KeyValue:
    return KeyValue(*(jnp.concatenate(parts, axis=2) for parts in zip(*tokens, strict=True)))


def _replaced(tokens: list[KeyValue], new: KeyValue, at: int) -> list[KeyValue]:
    return [*tokens[:at], new, *tokens[at + 1 :]]


_PROGRAMS: tuple[Any, ...] = (_run_forward, _run_depth, _run_head, _embed, _run_layer, _take_in)
