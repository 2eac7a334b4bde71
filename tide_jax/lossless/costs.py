"""Measures the time of passes over one, two or several tokens on this machine, for `tide_jax.lossless.control`."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tide_jax.checks import whole_number
from tide_jax.exits.queue import pass_widths
from tide_jax.lossless.control import PassCosts
from tide_jax.lossless.speculate import MOST_SLOTS
from tide_jax.model.decoder import Decoder

_MOST_LAYERS = 8  # enough that their weights don't stay in a CPU's caches
_REPEATS = 8


def measure_pass_costs(model: Decoder, *, batch: int = 1, most_slots: int = MOST_SLOTS) -> PassCosts:
    """Times layers and the output head at each width of a pass; takes a few seconds, compilation included.

    Attention over earlier tokens is not measured: its time hardly depends on the width.

    Args:
      model: the decoder.
      batch: rows of the batch.
      most_slots: slots of the widest pass.

    Raises:
      TideError: `batch` or `most_slots` is below 1.
    """
    batch = whole_number("batch", batch, 1)
    widths = pass_widths(whole_number("most_slots", most_slots, 1))
    # Compile one program for each kind of layer; time layers spread over the depth.
    count = min(_MOST_LAYERS, len(model.layers))
    chosen = np.unique(np.linspace(0, len(model.layers) - 1, count).astype(int))
    programs: dict[Any, Callable[..., Any]] = {}
    layers = [_flat(programs, model.layers[i], lambda layer, x, c: layer(x, c, None)[0]) for i in chosen.tolist()]
    head = _flat(programs, model, lambda model, x: jnp.argmax(model.logits(model.final_norm(x)), axis=-1))
    layer_times: dict[int, list[float]] = {w: [] for w in widths}
    head_times: dict[int, list[float]] = {w: [] for w in widths}
    # Alternate between widths, so that a slow moment of the machine doesn't hit one width alone.
    for _ in range(_REPEATS + 1):  # the first round compiles
        for width in widths:
            x = jnp.ones((batch, width, model.config.hidden_size), model.dtype)
            contexts = model.contexts(jnp.broadcast_to(jnp.arange(width, dtype=jnp.int32), (batch, width)), None)
            layer_times[width].append(_seconds(lambda x=x, c=contexts: _through(layers, x, c)) / len(layers))
            head_times[width].append(_seconds(lambda x=x: head(x)))

    def least(times: dict[int, list[float]]) -> jax.Array:
        # The minimum: other load on the machine only adds time, unevenly; medians differed by half.
        return jnp.asarray([min(times[w][1:]) for w in widths], jnp.float32)

    return PassCosts(least(layer_times), least(head_times))


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
