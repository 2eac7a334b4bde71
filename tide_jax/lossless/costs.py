"""Measures the time of passes and of drafts on this machine, for `tide_jax.lossless.control`."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tide_jax.checks import whole_number
from tide_jax.lossless.control import PassCosts, pass_widths
from tide_jax.lossless.drafts import Drafter
from tide_jax.lossless.speculate import MOST_SLOTS, TEXT_ONLY
from tide_jax.model.decoder import Decoder
from tide_jax.model.ops import likeliest

_MOST_LAYERS = 8  # enough that their weights don't stay in a CPU's caches
_REPEATS = 8


def measure_pass_costs(
    model: Decoder, drafters: Sequence[Drafter] = TEXT_ONLY, *, batch: int = 1, most_slots: int = MOST_SLOTS
) -> PassCosts:
    """Times layers and the output head at each width of a pass; takes a few seconds, compilation included.

    Attention over earlier tokens is not measured: its time hardly depends on the width.

    Args:
      model: the decoder.
      drafters: who may draft; a pass over one token of a drafter's own model is timed, too.
      batch: rows of the batch.
      most_slots: slots of the widest pass.

    Raises:
      TideError: `batch` or `most_slots` is below 1.
    """
    batch = whole_number("batch", batch, 1)
    widths = pass_widths(whole_number("most_slots", most_slots, 1))
    passes = {width: _Passes(model, batch, width) for width in widths}
    drafts = [None if drafter.model is None else _Passes(drafter.model, batch, 1) for drafter in drafters]
    timed = [*passes.values(), *(draft for draft in drafts if draft is not None)]
    # Alternate between them, so that a slow moment of the machine doesn't hit one alone. The first round compiles.
    for _ in range(_REPEATS + 1):
        for each in timed:
            each.run()
    return PassCosts(
        passes=jnp.asarray([each.seconds() for each in passes.values()], jnp.float32),
        drafts=jnp.asarray([0.0 if draft is None else draft.seconds() for draft in drafts], jnp.float32),
    )


class _Passes:
    """Times passes of one width: layers spread over the depth, and the output head."""

    def __init__(self, model: Decoder, batch: int, width: int) -> None:
        count = min(_MOST_LAYERS, len(model.layers))
        chosen = np.unique(np.linspace(0, len(model.layers) - 1, count).astype(int))
        programs: dict[Any, Callable[..., Any]] = {}  # one for each kind of layer
        self._layers = [
            _flat(programs, model.layers[i], lambda layer, x, c: layer(x, c, None)[0]) for i in chosen.tolist()
        ]
        self._head = _flat(programs, model, lambda model, x: likeliest(model.logits(model.final_norm(x))))
        self._all = len(model.layers)
        self._x = jnp.ones((batch, width, model.config.hidden_size), model.dtype)
        positions = jnp.broadcast_to(jnp.arange(width, dtype=jnp.int32), (batch, width))
        self._contexts = model.contexts(positions, None)
        self._times: list[tuple[float, float]] = []

    def run(self) -> None:
        """Runs once, and keeps the seconds of the layers and of the head."""
        layers = _seconds(lambda: _through(self._layers, self._x, self._contexts))
        self._times.append((layers, _seconds(lambda: self._head(self._x))))

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


def _through(layers: list[Callable[..., Any]], x: jax.Array, contexts: Any) -> jax.Array:
    for layer in layers:
        x = layer(x, contexts)
    return x


def _seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - start
