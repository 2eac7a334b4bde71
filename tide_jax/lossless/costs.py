"""Measures the time of passes and of drafts on this machine, for `tide_jax.lossless.control`."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tide_jax.checks import whole_number
from tide_jax.lossless.control import PassCosts, verify_widths
from tide_jax.lossless.drafts import Drafter
from tide_jax.lossless.speculate import MOST_SLOTS, TEXT_ONLY
from tide_jax.model.attention.span import BLOCK
from tide_jax.model.cache import KVCache, empty_cache
from tide_jax.model.decoder import Decoder
from tide_jax.model.ops import likeliest

_MOST_LAYERS = 8  # enough that their weights don't stay in a CPU's caches
_REPEATS = 8
_FILLED = 2 * BLOCK  # slots that a pass reads to measure attention


def measure_pass_costs(
    model: Decoder, drafters: Sequence[Drafter] = TEXT_ONLY, *, batch: int = 1, most_slots: int = MOST_SLOTS
) -> PassCosts:
    """Times layers and the output head at each width of a pass; takes a few seconds, compilation included.

    Tokens are random, so that they take different experts. Attention over earlier tokens is timed for one token a row:
    it hardly depends on the width.

    Args:
      model: the decoder.
      drafters: who may draft; a pass over one token of a drafter's own model is timed, too.
      batch: rows of the batch.
      most_slots: slots of the widest pass.

    Raises:
      TideError: `batch` or `most_slots` is below 1.
    """
    batch = whole_number("batch", batch, 1)
    passes = [_Passes(model, batch, width) for width in verify_widths(whole_number("most_slots", most_slots, 1))]
    reading = _Passes(model, batch, 1, filled=_FILLED)
    drafts = [None if drafter.model is None else _Passes(drafter.model, batch, 1) for drafter in drafters]
    timed = [*passes, reading, *(draft for draft in drafts if draft is not None)]
    # Alternate between them, so that a slow moment of the machine doesn't hit one alone. The first round compiles.
    for _ in range(_REPEATS + 1):
        for each in timed:
            each.run()
    seconds = [each.seconds() for each in passes]
    return PassCosts(
        passes=jnp.asarray(seconds, jnp.float32),
        drafts=jnp.asarray([0.0 if draft is None else draft.seconds() for draft in drafts], jnp.float32),
        attention=jnp.float32(max(0.0, reading.seconds() - seconds[0]) / _FILLED),
    )


class _Passes:
    """Times passes of one width: layers spread over the depth, and the output head.

    Args:
      filled: slots of earlier tokens that the layers read.
    """

    def __init__(self, model: Decoder, batch: int, width: int, *, filled: int = 0) -> None:
        most = min(_MOST_LAYERS, len(model.layers))
        chosen = np.unique(np.linspace(0, len(model.layers) - 1, most).astype(int))
        programs: dict[Any, Callable[..., Any]] = {}  # one for each kind of layer
        self._layers = [
            _flat(programs, model.layers[i], lambda layer, *given: layer(*given)[0]) for i in chosen.tolist()
        ]
        self._head = _flat(
            programs, model, lambda model, x: likeliest(model.logits(model.final_norm(model.residual(x))))
        )
        self._all = len(model.layers)
        self._x = jax.random.normal(jax.random.key(0), (batch, width, model.config.stream_size), model.dtype)
        cache = _filled_cache(model, batch, filled) if filled else None
        self._cached = [None if cache is None else cache.layer(i) for i in chosen.tolist()]
        positions = jnp.broadcast_to(filled + jnp.arange(width, dtype=jnp.int32), (batch, width))
        self._contexts = model.contexts(positions, cache)
        self._times: list[tuple[float, float]] = []

    def run(self) -> None:
        """Runs once, and keeps the seconds of the layers and of the head."""
        layers = _seconds(self._run_layers)
        self._times.append((layers, _seconds(lambda: self._head(self._x))))

    def _run_layers(self) -> jax.Array:
        x = self._x
        for layer, cached in zip(self._layers, self._cached, strict=True):
            x = layer(x, self._contexts, cached)
        return x

    def seconds(self) -> float:
        """Seconds of a whole pass.

        The minimum without the first run: other load on the machine only adds time, unevenly; medians differed by half.
        """
        layers, head = (min(column) for column in zip(*self._times[1:], strict=True))
        return layers / len(self._layers) * self._all + head


def _flat(programs: dict[Any, Callable[..., Any]], module: Any, function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiles `function(module, *args)` once for modules of one structure, and binds this module's leaves.

    Flattening the module at each call would take longer than running a small layer.
    """
    leaves, structure = jax.tree.flatten(module)
    if structure not in programs:
        programs[structure] = jax.jit(lambda leaves, *args: function(jax.tree.unflatten(structure, leaves), *args))
    program = programs[structure]
    return lambda *args: program(leaves, *args)


def _filled_cache(model: Decoder, batch: int, slots: int) -> KVCache:
    """A full cache."""
    cache = empty_cache(model.config, batch, slots, model.dtype)
    positions = jnp.broadcast_to(jnp.arange(cache.capacity, dtype=jnp.int32), (batch, cache.capacity))
    return cache._replace(positions=positions, length=jnp.int32(cache.capacity))


def _seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - start
