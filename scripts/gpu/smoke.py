"""The first minute on a GPU: is decoding right there, and how fast is it at batch 1?"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tide_jax.exits.exits import Exits
from tide_jax.functional import Decoder, Prompt, decode_step, init_cache, prefill
from tide_jax.testing import constant_routers, tiny_config, tiny_decoder

NAMES = ("full depth", "head only", "routers on, no exits", "routers on, no exits, one graph")
"""The variants of scripts.gpu.decode that answer the question."""
_STEPS, _ROWS = 4, 2
_MOST = 2e-3
"""Largest difference of float32 logits between a GPU and a processor: their sums have another order."""


def compare_with_processor() -> dict[str, Any]:
    """Decodes with a tiny float32 model, at full depth and with exits, here and on the processor.

    Returns:
      The largest difference of the logits, whether all tokens left after the same layer, and whether this is right.
    """
    here, there = jax.devices()[0], jax.devices("cpu")[0]
    difference, same = 0.0, True
    for exits in (False, True):
        (own, own_layers), (other, other_layers) = (_decoded(device, exits) for device in (here, there))
        difference = max(difference, float(np.max(np.abs(own - other))))
        same &= bool((own_layers == other_layers).all())
    return {"difference": difference, "same_depth": same, "right": same and difference <= _MOST}


def passed(found: dict[str, Any]) -> bool:
    """Whether decoding was right, in small and at full size, from the part of a report."""
    return found["right"] and all("error" not in row and row.get("as_forced", True) for row in found["rows"])


def verdict(found: dict[str, Any]) -> str:
    """Says whether decoding was right and how fast, in one line, from the part of a report."""
    words = "right" if found["right"] else "WRONG"
    facts = [f"decoding is {words} (logits differ by up to {found['difference']:.1e} from a processor's)"]
    for row in found["rows"]:
        name = row["variant"]
        if "ms_per_step" in row and name != "head only":
            share = f", {row['share_of_floor']:.0%} of the floor" if "share_of_floor" in row else ""
            forced = "" if row.get("as_forced", True) else " (WRONG depth)"
            facts.append(f"{name}: {row['ms_per_step']:.2f} ms a token{share}{forced}")
        elif failed := row.get("error") or row.get("not_run"):
            facts.append(f"{name}: {failed}")
    return "; ".join(facts)


def _decoded(device: Any, exits: bool) -> tuple[np.ndarray, np.ndarray]:
    """Logits and last layers of a prompt's end and of some steps, computed on a device."""
    with jax.default_device(device):
        model = tiny_decoder(tiny_config(num_layers=4))
        given = Exits.uniform(constant_routers(model.config, interval=2), 0.5) if exits else None
        logits, layers = jax.jit(_run)(model, given)
        return np.asarray(logits), np.asarray(layers)


def _run(model: Decoder, exits: Exits | None) -> tuple[jax.Array, jax.Array]:
    tokens = jnp.arange(_ROWS * 8, dtype=jnp.int32).reshape(_ROWS, 8) + 3
    cache = init_cache(model.config, _ROWS, 8 + _STEPS, model.dtype, exits=exits)
    out = prefill(model, Prompt(tokens, jnp.asarray([8, 5], jnp.int32)), cache, exits)
    found = [(out.logits, out.exit_layers)]
    for step in range(_STEPS):
        positions = jnp.asarray([8, 5], jnp.int32) + jnp.int32(step)
        newest = jnp.full((_ROWS,), 7 + step, jnp.int32)
        out = decode_step(model, out.cache, newest, positions, jnp.ones((_ROWS,), bool), exits)
        found.append((out.logits, out.exit_layers))
    logits, layers = zip(*found, strict=True)
    return jnp.stack(logits), jnp.stack(layers)
