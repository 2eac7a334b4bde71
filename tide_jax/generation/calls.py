"""Checks the arguments of a generation and makes them a `Call`: padded arrays, traced settings, limits."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from tide_jax.checks import whole_number
from tide_jax.errors import TideError
from tide_jax.exits.exits import Exits
from tide_jax.generation.batch import PromptRows, bucket, eos_table, pad_left, pad_rows, row_bucket, to_rows
from tide_jax.generation.choice import Choice, choose
from tide_jax.generation.driver import Call
from tide_jax.generation.generate import Prompt, Request
from tide_jax.generation.logit_rules import make_rules
from tide_jax.model.architecture import DecoderConfig
from tide_jax.model.sharding import DATA, split_rows

logger = logging.getLogger(__name__)


def make_call(
    config: DecoderConfig,
    mesh: Mesh | None,
    exits: Callable[[int], Exits | None],
    input_ids: Any,
    *,
    attention_mask: Any = None,
    key: Any = None,
    **arguments: Any,
) -> Call:
    """Checks a request and lays it out for the compiled programs.

    Args:
      config: the model's.
      mesh: devices that the rows are split over.
      exits: gives the exits for a number of decoded rows.
      input_ids, attention_mask, key, arguments: as in `TIDE.generate`.

    Raises:
      TideError: invalid input; the message is one line.
    """
    # Check the prompts and resolve the generation settings.
    rows = to_rows(input_ids, attention_mask, config)
    choice = choose(config.generation, **arguments)
    if float(choice.sampling.temperature) > 0 and key is None:
        raise TideError("sampling draws at random and needs key=jax.random.key(seed)")
    _check_key(key)
    pad = _pad_id(choice.pad_token_id, config)
    eos = eos_table(config.eos_token_ids if choice.eos_token_id is None else choice.eos_token_id, len(rows.rows))
    batch = program_rows(len(rows.rows), mesh)
    used_exits = exits(batch)
    # After all other checks: this may log a warning, which should not precede an error.
    new, most = _limits(rows, choice, config.context_length)
    request = Request(
        sampling=choice.sampling,
        key=jax.random.key(0) if key is None else key,
        eos=jnp.asarray(pad_rows(eos, batch, -1)),
        pad=jnp.int32(pad),
        max_new_tokens=jnp.int32(new),
        rules=make_rules(choice.settings, config.vocab_size),
        max_length=jnp.int32(most),
    )
    # Pad rows and columns to bucket sizes.
    width = bucket(int(rows.lengths.max()))
    lengths = pad_rows(rows.lengths, batch, 0)
    prompt = Prompt(jnp.asarray(pad_left(rows.rows, width, batch=batch)), jnp.asarray(lengths))
    return Call(rows, split_rows(prompt, mesh), request, used_exits, bucket(new), choice.stops)


def program_rows(count: int, mesh: Mesh | None) -> int:
    """Batch size of the compiled programs for `count` rows."""
    return row_bucket(count, 1 if mesh is None else mesh.shape[DATA])


def _pad_id(pad_token_id: Any, config: DecoderConfig) -> int:
    if pad_token_id is not None:
        pad_token_id = whole_number("pad_token_id", pad_token_id, high=config.vocab_size - 1)
    return next((p for p in (pad_token_id, config.pad_token_id) if p is not None), 0)


def _limits(rows: PromptRows, choice: Choice, context: int) -> tuple[int, int]:
    """Most new tokens of any row, and most tokens of a row with its prompt; each row ends at the first it reaches.

    Raises:
      TideError: a limit is no whole number above 0, or a prompt has `max_length` tokens or more.
    """
    lengths = rows.lengths.astype(np.int64)
    most = context + 1  # the last new token never runs through the model, so it needs no position
    if choice.max_length is not None:
        wanted = whole_number("max_length", choice.max_length, low=1)
        if wanted > most:
            logger.warning("max_length=%d clipped to %d: the context holds %d tokens", wanted, most, context)
        most = min(most, wanted)
        if (longest := int(lengths.max())) >= most:
            raise TideError(
                f"a prompt has {longest} tokens and max_length={wanted} counts them, too; raise it or pass "
                "max_new_tokens"
            )
    room = most - lengths
    if choice.max_new_tokens is None:
        return int(room.max()), most
    new = whole_number("max_new_tokens", choice.max_new_tokens, low=1)
    if clipped := int(np.sum(room < new)):
        logger.warning(
            "max_new_tokens=%d clipped to %d%s: the context holds %d tokens",
            new,
            room.min(),
            "" if len(room) == 1 else f" for the longest of {clipped} of the {len(room)} prompts",
            context,
        )
    return min(new, int(room.max())), most


def _check_key(key: Any) -> None:
    """Raises TideError unless `key` is None or a single JAX key, of the new style or the old."""
    dtype, shape = getattr(key, "dtype", None), getattr(key, "shape", None)
    new = dtype is not None and jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key) and shape == ()
    if key is not None and not new and not (dtype == np.uint32 and shape in ((2,), (4,))):
        raise TideError(f"key is {type(key).__name__}, expected a single key: jax.random.key(seed)")
