"""Scores batches: the logits of every token in one pass, with or without exits."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from tide_jax.exits.depth import DepthOutput, run_depth
from tide_jax.exits.exits import Exits
from tide_jax.generation.batch import PromptRows, bucket, pad_rows, positions_of
from tide_jax.generation.calls import program_rows
from tide_jax.generation.finite import check_finite, finite_rows
from tide_jax.generation.outputs import ScoreOutput
from tide_jax.generation.programs import Programs
from tide_jax.generation.stats import ExitStats
from tide_jax.model.decoder import Decoder
from tide_jax.model.sharding import fetch, readable, split_rows


def score_rows(
    model: Decoder,
    programs: Programs,
    mesh: Mesh | None,
    rows: PromptRows,
    prompt: Int[np.ndarray, "B 1"],
    exits: Exits | None,
) -> ScoreOutput:
    """Scores checked rows.

    Args:
      model, programs, mesh: as in `TIDE`.
      rows: the rows.
      prompt: number of leading tokens of each row that run at full depth.
      exits: routers and thresholds; None runs every layer.

    Raises:
      TideError: logits are not finite.
    """
    # Pad rows and columns to bucket sizes.
    batch, width = rows.mask.shape
    positions = pad_rows(positions_of(rows.mask, bucket(width)), program_rows(batch, mesh), -1)
    tokens = np.zeros(positions.shape, np.int32)
    tokens[positions >= 0] = np.concatenate(rows.rows)
    may_exit = positions >= pad_rows(prompt, len(positions), 0)
    inputs = split_rows((jnp.asarray(tokens), jnp.asarray(positions), jnp.asarray(may_exit)), mesh)
    (out, logits, finite), seconds, compiled = programs.run(_score, (model,), (*inputs, exits))
    # Check the result, and cut the padding off.
    exit_layers, finite = fetch((out.exit_layers, finite))
    check_finite(finite[:batch], model.dtype)
    exit_layers = exit_layers[:batch, :width]
    stats = ExitStats.from_exit_layers(
        exit_layers,
        num_layers=model.config.num_layers,
        layers_executed=int(fetch(out.layers_executed)),
        steps=1,
        wall_time=seconds,
        compile_time=compiled,
    )
    return ScoreOutput(jnp.asarray(readable(logits))[:batch, :width], exit_layers, stats)


def _score(
    model: Decoder,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    may_exit: Bool[Array, "B T"],
    exits: Exits | None,
) -> tuple[DepthOutput, Float[Array, "B T V"], Bool[Array, " B"]]:
    out = run_depth(model, tokens, positions, None, exits, may_exit=may_exit)
    logits, last = model.logits(out.states), jnp.argmax(positions, axis=1)[:, None, None]
    finite = finite_rows(jnp.take_along_axis(logits, last, axis=1)) & finite_rows(out.states, positions >= 0)
    return out, logits, finite | jnp.all(positions < 0, axis=1)
