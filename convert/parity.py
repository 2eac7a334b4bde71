"""Parity of a converted checkpoint with transformers' own model of it: full depth, cache, padding, text and exits.

What `convert.verify` does for one batch of a large model, this does for every path of a small one.
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
from convert.verify import TOLERANCE
from tide_jax.cache import KVCache, init_cache
from tide_jax.checkpoint import load
from tide_jax.decoder import Decoder
from tide_jax.early_exit import ExitGate, run_depth
from tide_jax.layers import DecoderLayer, KeyValue
from tide_jax.router import Routers
from tide_jax.testing import constant_routers

LENGTHS = (20, 20, 13, 9)
"""Real tokens of each row. Rows end together, and all are longer than the sliding windows of `convert.tiny` (7)."""
NEW_TOKENS = 16
_WHOLE = 2  # leading rows without padding
_FIRST_TOKEN = 4  # below lie the special tokens
_LEAST_RANGE = 2.0
_PATHS = ("prefill", "padded", "decode", "forced_exit", "mixed_exit")


@dataclasses.dataclass(frozen=True)
class ParityReport:
    """How far a converted model is from transformers' in float32; every difference is a share of the logit range.

    Attributes:
      model_type: of the checkpoint.
      prefill: rows without padding, in one pass.
      padded: rows with padding on the left, in one pass and token by token, against transformers without padding.
      decode: rows without padding, token by token through the cache, against transformers' cache.
      forced_exit: all tokens but the first leave at the middle layer, against transformers' state after that layer.
      mixed_exit: some tokens leave there and others go on, against a plain walk over tokens and layers.
      greedy_tokens: leading tokens of `NEW_TOKENS` after a prompt that equal transformers' greedy text in every row.
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
        if not self.logit_range >= _LEAST_RANGE:
            found.append(f"the logits hardly differ, by {self.logit_range:.1e}: nothing was tested")
        return tuple(found)


def measure_parity(checkpoint: str | Path) -> ParityReport:
    """Converts a checkpoint into a temporary directory and compares all paths with transformers' model of it.

    Args:
      checkpoint: a Hugging Face directory with a small model; see `convert.tiny.save_tiny`.

    Raises:
      TideError: the checkpoint cannot be converted.
    """
    with tempfile.TemporaryDirectory() as directory:
        model_type = convert(checkpoint, Path(directory) / "converted", dtype="float32").model_type
        model = load(Path(directory) / "converted", "float32")
    # Without provenance, families of one architecture share their compiled programs.
    model.config = dataclasses.replace(model.config, model_type="", eos_token_ids=(), pad_token_id=None)
    limit = _steady_length(model)
    reference = Reference(checkpoint, together=limit is not None)
    batch = random_batch(model.config.vocab_size)
    short = batch if limit is None else batch.first(limit)
    some = short.mask & np.random.default_rng(11).integers(0, 2, short.mask.shape).astype(bool)

    expected, states = reference.logits_and_states(batch, _middle(model))
    at_middle = np.where((batch.positions >= 1)[..., None], _head(model, jnp.asarray(states)), expected)
    prefill, text = _prefill(model, batch)
    decode = _decode(model, batch)
    steps = reference.steps(batch)
    spread = float(np.ptp(expected[batch.mask]))

    def relative(found: np.ndarray, wanted: np.ndarray, where: np.ndarray) -> float:
        return float(np.abs(found - wanted)[where].max()) / max(spread, 1e-30)

    padded = (slice(_WHOLE, None), expected[_WHOLE:], batch.mask[_WHOLE:])
    return ParityReport(
        model_type=model_type,
        prefill=relative(prefill[:_WHOLE], expected[:_WHOLE], batch.mask[:_WHOLE]),
        # Where frequencies depend on the length, so do the keys that a decoder has cached.
        padded=max(relative(a[padded[0]], *padded[1:]) for a in ([prefill, decode] if limit is None else [prefill])),
        decode=relative(decode[:_WHOLE], expected[:_WHOLE] if steps is None else steps, batch.mask[:_WHOLE]),
        forced_exit=relative(_exit_at_middle(model, batch, batch.mask), at_middle, batch.mask),
        mixed_exit=relative(_exit_at_middle(model, short, some), _walk(model, short, some), short.mask),
        greedy_tokens=int(np.cumprod((text[:_WHOLE] == reference.greedy(batch)).all(axis=0)).sum()),
        logit_range=spread,
    )


def _steady_length(model: Decoder) -> int | None:
    """Length up to which rotary frequencies do not depend on the length; None where they never do."""
    ropes = [kind.rope for kind in model.config.attention_types if kind.rope is not None]
    limits = {"dynamic": "max_positions", "longrope": "original_max_positions"}
    return min((getattr(rope, limits[rope.kind]) for rope in ropes if rope.kind in limits), default=None)


class Batch(NamedTuple):
    """Tokens [B, T], their positions (-1 for padding), and which are real."""

    tokens: np.ndarray
    positions: np.ndarray
    mask: np.ndarray

    def first(self, columns: int) -> Batch:
        """The leading columns."""
        return Batch(*(a[:, :columns] for a in self))

    def last(self, rows: np.ndarray, columns: int) -> Batch:
        """The trailing columns of some rows."""
        return Batch(*(a[rows, -columns:] for a in self))


def random_batch(vocab: int) -> Batch:
    """Random tokens in rows of `LENGTHS`, padded on the left."""
    longest = max(LENGTHS)
    mask = np.arange(longest)[None] >= longest - np.array(LENGTHS)[:, None]
    tokens = np.random.default_rng(7).integers(_FIRST_TOKEN, vocab, mask.shape)
    positions = np.where(mask, np.cumsum(mask, axis=1) - 1, -1)
    return Batch(tokens.astype(np.int32), positions.astype(np.int32), mask)


# Each program runs a few times on small arrays: compiling it is what takes time.
_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@_jit
def _forward(model: Decoder, tokens: Array, positions: Array) -> tuple[Float[Array, "B T V"], KeyValue]:
    x, rows = model.run_layers(tokens, positions, None)
    return model.logits(model.final_norm(x)), rows


@_jit
def _step(model: Decoder, tokens: Array, positions: Array, cache: KVCache) -> tuple[Float[Array, "B T V"], KVCache]:
    x, rows = model.run_layers(tokens, positions, cache)
    return model.logits(model.final_norm(x)), cache.append(rows, positions)


@_jit
def _exit(
    model: Decoder, tokens: Array, positions: Array, routers: Routers, may_exit: Bool[Array, "B T"]
) -> tuple[Float[Array, "B T V"], Int[Array, "B T"]]:
    """Logits and exit layers where every token that may leaves at the first checkpoint."""
    gate = ExitGate(jnp.zeros((len(routers.checkpoints),)), jnp.int32(0))
    out = run_depth(model, tokens, positions, None, routers=routers, gate=gate, may_exit=may_exit)
    return model.logits(out.states), out.exit_layers


@_jit
def _head(model: Decoder, states: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
    return model.logits(model.final_norm(states))


def _prefill(model: Decoder, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
    """Logits of one pass, and `NEW_TOKENS` greedy tokens after each row, [B, NEW_TOKENS]."""
    logits, rows = _forward(model, jnp.asarray(batch.tokens), jnp.asarray(batch.positions))
    cache = _empty_cache(model, batch).append(rows, jnp.asarray(batch.positions))
    text = [np.argmax(logits[:, -1], axis=-1)]
    for n in range(1, NEW_TOKENS):
        tokens, positions = text[-1][:, None].astype(np.int32), batch.positions[:, -1:] + np.int32(n)
        out, cache = _step(model, jnp.asarray(tokens), jnp.asarray(positions), cache)
        text.append(np.argmax(out[:, -1], axis=-1))
    return np.asarray(logits), np.stack(text, axis=1)


def _decode(model: Decoder, batch: Batch) -> np.ndarray:
    """Logits of the batch's tokens, one at a time through the cache."""
    cache, logits = _empty_cache(model, batch), []
    for t in range(batch.tokens.shape[1]):
        now = (jnp.asarray(a[:, t : t + 1]) for a in (batch.tokens, batch.positions))
        out, cache = _step(model, *now, cache)
        logits.append(np.asarray(out))
    return np.concatenate(logits, axis=1)


def _empty_cache(model: Decoder, batch: Batch) -> KVCache:
    rows, length = batch.tokens.shape
    return init_cache(model.config, rows, length + NEW_TOKENS, jnp.dtype(jnp.float32))


def _middle(model: Decoder) -> int:
    return (model.config.num_layers - 1) // 2


def _exit_at_middle(model: Decoder, batch: Batch, may_exit: np.ndarray) -> np.ndarray:
    """Logits [B, T, V] where the tokens that may leave do so at the middle layer; NaN where one left elsewhere."""
    middle = _middle(model)
    routers = constant_routers(model.config, interval=middle + 1)
    arrays = (jnp.asarray(a) for a in (batch.tokens, batch.positions))
    logits, layers = _exit(model, *arrays, routers, jnp.asarray(may_exit))
    leave = may_exit & (batch.positions >= 1)
    expected = np.where(batch.mask, np.where(leave, middle, model.config.num_layers - 1), -1)
    return np.where((np.asarray(layers) == expected)[..., None], np.asarray(logits), np.nan)


def _walk(model: Decoder, batch: Batch, may_exit: np.ndarray) -> np.ndarray:
    """The same logits, one token and one layer after the other.

    No groups and no cache: keys and values lie in Python lists. A token that has left stays as it is, and only leaves
    its keys and values behind.
    """
    rows, length = batch.tokens.shape
    heads, *channels = model.config.cache_shape
    empty = KeyValue(*(jnp.zeros((rows, heads, 1, c), jnp.float32) for c in channels))
    memory = [[empty] * length for _ in model.layers]  # as long from the start: shapes never change
    leave = may_exit & (batch.positions >= 1)
    states = []
    for t in range(length):
        tokens, positions = batch.tokens[:, t : t + 1], batch.positions[:, t : t + 1]
        seen = np.where(np.arange(length) < t, batch.positions, np.int32(-1))
        x, contexts = _enter(model, jnp.asarray(tokens), jnp.asarray(positions), jnp.asarray(seen))
        for i, layer in enumerate(model.layers):
            left = leave[:, t] & (i > _middle(model))
            x, memory[i][t] = _advance(layer, x, contexts, memory[i], jnp.asarray(left))
        states.append(x)
    return np.asarray(_head(model, jnp.concatenate(states, axis=1)))


class _Slots(NamedTuple):
    """What `Decoder.contexts` reads of a cache."""

    positions: Int[Array, "B S"]


@_jit
def _enter(model: Decoder, tokens: Array, positions: Array, seen: Array) -> tuple[Float[Array, "B 1 D"], Any]:
    """The states before the first layer, and what layers need to look back at the positions seen."""
    slots: Any = _Slots(seen)
    return model.embed_tokens(tokens, positions), model.contexts(positions, slots)


@_jit
def _advance(
    layer: DecoderLayer, x: Array, contexts: Any, memory: list[KeyValue], left: Bool[Array, " B"]
) -> tuple[Float[Array, "B 1 D"], KeyValue]:
    """Runs a layer on one token of each row; rows that have left keep their state, and only leave keys and values."""
    cached = KeyValue(*(jnp.concatenate(parts, axis=2) for parts in zip(*memory, strict=True)))
    y, new = layer(x, contexts, cached)
    kept = layer.project_kv(x, contexts)
    new = KeyValue(*(jnp.where(left[:, None, None, None], a, b) for a, b in zip(kept, new, strict=True)))
    return jnp.where(left[:, None, None], x, y), new


class Reference:
    """Transformers' model of a checkpoint, float32, read from disk.

    Args:
      checkpoint: where it lies.
      together: run the batch as one, padded; otherwise each length by itself, as a user with one prompt would.
    """

    def __init__(self, checkpoint: str | Path, together: bool) -> None:
        import torch
        from transformers import AutoModelForCausalLM, GenerationConfig

        self._torch = torch
        self._together = together
        self._model: Any = AutoModelForCausalLM.from_pretrained(
            checkpoint, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        # Nothing but the greedy choice: some families force tokens or stop at them.
        self._model.generation_config = GenerationConfig(do_sample=False, pad_token_id=0)

    def logits_and_states(self, batch: Batch, layer: int) -> tuple[np.ndarray, np.ndarray]:
        """Logits [B, T, V] and the residual stream after a layer [B, T, D]; zeros for padding."""
        fired: dict[str, np.ndarray] = {}

        def watch(name: str, module: Any) -> Any:
            def hook(_module: Any, _inputs: Any, output: Any) -> None:
                fired.setdefault(name, (output[0] if isinstance(output, (tuple, list)) else output).numpy())

            return module.register_forward_hook(hook)

        handles = [watch(name, module) for name, module in self._nth_modules(layer)]
        logits, states = [], []
        for rows in self._parts(batch):
            fired.clear()
            logits.append(self._run(rows))
            states.append(fired[min(fired, key=lambda name: name.count("."))])
        for handle in handles:
            handle.remove()
        return _padded(logits), _padded(states)

    def steps(self, batch: Batch) -> np.ndarray | None:
        """Logits of one token of whole rows at a time, through transformers' cache; None where it has none."""
        cache, logits = None, []
        for column in self._ids(batch.tokens[:_WHOLE]).T[:, :, None]:
            with self._torch.no_grad():
                out = self._model(input_ids=column, past_key_values=cache, use_cache=True)
            cache = getattr(out, "past_key_values", None)
            if cache is None:
                return None
            logits.append(out.logits.numpy())
        return np.concatenate(logits, axis=1)

    def greedy(self, batch: Batch) -> np.ndarray:
        """`NEW_TOKENS` tokens after each whole row: `generate`, where its text is that of the logits without a cache.

        It is not for families whose `forward` counts positions from another number than `generate` does.
        """
        prompt = self._ids(batch.tokens[:_WHOLE])
        text = self._model.generate(prompt, max_new_tokens=NEW_TOKENS)
        if not self._together and not bool((self._best(text)[:, -NEW_TOKENS - 1 : -1] == text[:, -NEW_TOKENS:]).all()):
            text = prompt
            for _ in range(NEW_TOKENS):
                text = self._torch.cat([text, self._best(text)[:, -1:]], dim=1)
        return text.numpy()[:, prompt.shape[1] :]

    def _best(self, ids: Any) -> Any:
        """The most probable token after each token."""
        with self._torch.no_grad():
            return self._model(input_ids=ids).logits.argmax(-1)

    def _parts(self, batch: Batch) -> list[Batch]:
        """What to run at once: rows of equal length, or the whole batch."""
        if self._together:
            return [batch]
        lengths = batch.mask.sum(axis=1)
        return [batch.last(np.flatnonzero(lengths == n), int(n)) for n in dict.fromkeys(lengths.tolist())]

    def _run(self, batch: Batch) -> np.ndarray:
        inputs = {}
        if not batch.mask.all():
            mask = self._torch.tensor(batch.mask.astype(np.int64))
            inputs = {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
        with self._torch.no_grad():
            return self._model(input_ids=self._ids(batch.tokens), **inputs).logits.numpy()

    def _ids(self, tokens: np.ndarray) -> Any:
        return self._torch.tensor(np.asarray(tokens, np.int64))

    def _nth_modules(self, index: int) -> list[tuple[str, Any]]:
        """The module at an index of every list as long as there are layers; the decoder layer is one of them."""
        count = self._model.config.get_text_config().num_hidden_layers
        return [
            (name, module[index])
            for name, module in self._model.named_modules()
            if type(module).__name__ == "ModuleList" and len(module) == count
        ]


def _padded(parts: list[np.ndarray]) -> np.ndarray:
    """Rows of several lengths in one array, ending together."""
    longest = max(part.shape[1] for part in parts)
    return np.concatenate([np.pad(part, ((0, 0), (longest - part.shape[1], 0), (0, 0))) for part in parts])
