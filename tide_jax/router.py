"""Routers and exit heads: what is trained, after the model, to let tokens leave early."""

from __future__ import annotations

import dataclasses
import json
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.exit_step.reference import rms_normalise, router_scores
from tide_jax.ops import matmul


class Router(NamedTuple):
    """A checkpoint's router: ``sigmoid(up . silu(down^T rmsnorm(x) + down_bias) + up_bias)``, float32."""

    down: Float[Array, "D H"]
    down_bias: Float[Array, " H"]
    up: Float[Array, " H"]
    up_bias: Float[Array, ""]


class ExitHead(NamedTuple):
    """An affine exit head: ``n + n @ factors[0] (@ factors[1]) + bias`` with ``n = rmsnorm(x)``.

    One factor ``[D, D]`` is a full-rank map, two factors ``[D, R], [R, D]`` a low-rank one. The model's final norm
    follows, so the output's scale does not matter. The idea is the tuned lens (Belrose et al. 2023, arXiv:2303.08112).
    """

    factors: tuple[Float[Array, "..."], ...]
    bias: Float[Array, " D"]

    def __call__(self, x: Float[Array, "... D"], *, eps: float) -> Float[Array, "... D"]:
        """The state to hand to the final norm, in x's dtype."""
        rows = rms_normalise(x.reshape(-1, x.shape[-1]), eps)
        mapped = rows.astype(x.dtype)
        for factor in self.factors:
            mapped = matmul(mapped, factor.astype(x.dtype))
        out = rows + mapped.astype(jnp.float32) + self.bias.astype(jnp.float32)[None, :]
        return out.astype(x.dtype).reshape(x.shape)


@dataclasses.dataclass(frozen=True)
class RouterMetadata:
    """Where routers come from: facts about the model, the fit and the data, as sorted JSON (hashable)."""

    text: str = "{}"

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> RouterMetadata:
        """Wraps JSON-ready values."""
        return cls(json.dumps(values, sort_keys=True))

    def to_dict(self) -> dict[str, Any]:
        """The values."""
        return json.loads(self.text)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Routers:
    """Trained routers and exit heads of one model: a pytree.

    Attributes:
      routers: one for each checkpoint.
      heads: one for each checkpoint with `exit_strategy` "affine"; None with "identity".
      checkpoints: 0-based layers after which a router sits, ascending.
      metadata: where they come from; `report` is read from it.
    """

    routers: tuple[Router, ...]
    heads: tuple[ExitHead, ...] | None
    checkpoints: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    metadata: RouterMetadata = dataclasses.field(default=RouterMetadata(), metadata={"static": True})

    @property
    def report(self) -> dict[str, Any]:
        """What calibration measured on held-out text (empty for routers made by hand)."""
        return self.metadata.to_dict().get("report", {})

    @property
    def exit_strategy(self) -> str:
        """ "identity" or "affine"."""
        return "identity" if self.heads is None else "affine"

    def exit_state(self, checkpoint: int, x: Float[Array, "... D"], *, eps: float) -> Float[Array, "... D"]:
        """What the final norm reads for tokens leaving at the `checkpoint`-th checkpoint."""
        return x if self.heads is None else self.heads[checkpoint](x, eps=eps)

    def scores(self, checkpoint: int, x: Float[Array, "N D"], *, eps: float) -> Float[Array, " N"]:
        """Router scores of rows, float32."""
        return router_scores(x, *self.routers[checkpoint], eps=eps)

    def without_metadata(self) -> Routers:
        """The same weights without their history: two fits of one shape then share compiled programs."""
        return dataclasses.replace(self, metadata=RouterMetadata())

    def save(self, path: Any) -> None:
        """Writes one safetensors file; affine heads go to ``<stem>.heads.safetensors`` beside it.

        See `tide_jax.router_file.save`.
        """
        from tide_jax import router_file

        router_file.save(self, path)

    @classmethod
    def load(cls, path: Any, *, model: Any, checkpoint_interval: int | None = None) -> Routers:
        """Reads routers written by `save` and checks that they belong to `model`. See `tide_jax.router_file.load`."""
        from tide_jax import router_file

        return router_file.load(path, model=model, checkpoint_interval=checkpoint_interval)
