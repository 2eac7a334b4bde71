"""The 8-bit twin: the model's own weights, rounded to 8 bits, draft what the model would say.

At small batch a step costs the time to read the weights, and the twin's are a quarter of float32's. Rounding changes
few answers, so most of its drafts are accepted. It needs no training. QSpec (Zhao et al. 2024, arXiv:2410.11305) drafts
and verifies with two precisions of one model, too.

The twin reads the full model's cache. Behind its end, it writes keys and values of its own for the tokens that it
drafts. Verification overwrites them, so nothing that the twin computed outlives the pass.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int

from tide_jax.errors import TideError
from tide_jax.exits.depth import run_depth
from tide_jax.generation.generate import Request
from tide_jax.lossless.drafts import DraftedRows, Drafts
from tide_jax.lossless.verify import draw
from tide_jax.model.cache import KVCache
from tide_jax.model.decoder import Decoder, from_parameters, stored_parameters, summed_axes
from tide_jax.model.sharding import mesh_of


class TwinDrafter(NamedTuple):
    """Drafts with the 8-bit twin of the model, one token after the other.

    A draft is drawn with the random key of the full model's answer. So drafts agree as often as the distributions do,
    at any temperature.

    Attributes:
      model: the twin, from `make_twin`.
    """

    model: Decoder

    @property
    def name(self) -> str:
        return "int8 twin"

    @property
    def rates(self) -> tuple[tuple[float, float], ...]:
        return ((0.93, 0.93),)

    def look(self, rows: DraftedRows, most: int) -> Drafts:
        batch = len(rows.ends)
        return Drafts(jnp.zeros((batch, most), jnp.int32), jnp.zeros((batch,), jnp.int32))

    def draft(
        self, found: Drafts, rows: DraftedRows, cache: KVCache, request: Request, most: Int[Array, ""]
    ) -> tuple[Drafts, KVCache]:
        def step(s: _Loop) -> _Loop:
            # Run the newest token, or the newest draft, and draw the draft behind it.
            ends = rows.ends + s.made
            inputs = jnp.take_along_axis(s.tokens, ends[:, None] - 1, axis=1, mode="clip")
            positions = jnp.where(s.drafting, ends - 1 - rows.starts, -1)[:, None]
            out = run_depth(self.model, inputs, positions, s.cache)
            drafted = rows._replace(tokens=s.tokens, ends=ends, seen=s.seen)
            drawn = draw(self.model, out.states, drafted, ends[:, None], s.seen[:, None], request)[:, 0]
            index = jnp.arange(len(ends))
            # An overflow here is not the full model's, which reads masked slots times zero: keep them finite.
            new = jax.tree.map(lambda a: jnp.where(jnp.isfinite(a), a, 0), out.new)
            return _Loop(
                made=s.made + 1,
                drafting=s.drafting & ~jnp.any(drawn[:, None] == request.eos, axis=1),
                tokens=s.tokens.at[index, ends].set(drawn, mode="drop"),
                seen=s.seen.at[index, drawn].set(True),
                cache=s.cache.append(new, positions, self.model.layers),
            )

        start = _Loop(jnp.int32(0), found.confidence >= 0, rows.tokens, rows.seen, cache)
        end = lax.while_loop(lambda s: (s.made < most) & jnp.any(s.drafting), step, start)
        columns = rows.ends[:, None] + jnp.arange(found.tokens.shape[1], dtype=jnp.int32)[None]
        tokens = jnp.take_along_axis(end.tokens, columns, axis=1, mode="clip")
        return Drafts(tokens, found.confidence), end.cache.rolled_back(cache)


class _Loop(NamedTuple):
    """Carry of the loop over drafts.

    Attributes:
      made: drafts of a row so far.
      drafting: rows without an end-of-sequence draft.
      tokens: the rows with these drafts.
      seen: tokens that occur in each row, drafts included.
      cache: keys and values, those of the drafts included.
    """

    made: Int[Array, ""]
    drafting: Bool[Array, " B"]
    tokens: Int[Array, "B S"]
    seen: Bool[Array, "B V"]
    cache: KVCache


def make_twin(model: Decoder) -> Decoder:
    """The model with its weights rounded to 8 bits; what stays float is shared, not copied.

    Raises:
      TideError: the weights are 8-bit already, none of them has an 8-bit form, or another process holds a part of them.
    """
    if model.weights == "int8":
        raise TideError("this model's weights are 8-bit integers already: draft='int8' needs floats, use draft='text'")
    stored = stored_parameters(model)
    if not all(p.value.is_fully_addressable for p in stored):
        raise TideError("draft='int8' rounds weights on one process, and others hold some of these: use draft='text'")
    if not summed_axes(model.config):
        raise TideError("no weight of this model has an 8-bit form: use draft='text'")
    tensors = ((p.path, p.value) for p in stored)
    return from_parameters(model.config, tensors, dtype=model.dtype, mesh=mesh_of(model), stored=True, weights="int8")
