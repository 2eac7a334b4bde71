"""Everything that decides about exits, as one pytree that the pure functions take."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from tide_jax.config import KVStrategy
from tide_jax.exits.router import Routers


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Exits:
    """Routers and their settings. Arrays are traced: changing them never recompiles. The other fields are static.

    Attributes:
      routers: the routers that score tokens, with exit heads and translators.
      thresholds: float32 [C], one for each exit point.
      min_layers: int32 scalar, layers that every token runs at least.
      kv_strategy: how the cache of skipped layers is filled, see `tide_jax.ExitConfig`.
      prompt: whether prompt tokens may exit, too. If not, the prefill contains no router.
      deferred: with "propagate", whether cache rows of skipped layers wait until those of several tokens can be
        projected together, which is faster where `tide_jax.exits.deferred_fill.is_faster`. Rows are the same to
        rounding, except where rotary frequencies depend on the length so far.
      implementation: of the kernels around an exit, see `pallas_kernels`.
    """

    routers: Routers
    thresholds: Float[Array, " C"]
    min_layers: Int[Array, ""]
    kv_strategy: KVStrategy = dataclasses.field(default="propagate", metadata={"static": True})
    prompt: bool = dataclasses.field(default=False, metadata={"static": True})
    deferred: bool = dataclasses.field(default=False, metadata={"static": True})
    implementation: str | None = dataclasses.field(default=None, metadata={"static": True})

    @classmethod
    def uniform(cls, routers: Routers, threshold: ArrayLike, min_layers: ArrayLike = 0, **static: Any) -> Exits:
        """The same threshold at every exit point. `static`: the other fields."""
        thresholds = jnp.broadcast_to(jnp.asarray(threshold, jnp.float32), (len(routers.exit_points),))
        return cls(routers, thresholds, jnp.asarray(min_layers, jnp.int32), **static)

    @property
    def runs_on(self) -> bool:
        """Whether exited tokens run the deep layers after all, for their keys and values."""
        return self.kv_strategy == "recompute"

    @property
    def queues(self) -> bool:
        """Whether exited tokens wait in the cache while decoding."""
        return self.deferred or self.runs_on

    @property
    def projects_later(self) -> bool:
        """Whether exited tokens wait for their cache rows to be projected, not for their layers to run."""
        return self.deferred and not self.runs_on

    @property
    def code_size(self) -> int:
        """Size of the code that translators read of an exit state, 0 without translators."""
        return 0 if self.routers.translators is None else self.routers.translators.rank
