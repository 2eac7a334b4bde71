"""Translators: low-rank maps from a token's exit state to the input of each skipped layer.

State propagation projects the keys and values of a skipped layer from the exit state itself (CALM, Schuster et al.
2022, arXiv:2207.07061, section 3.3), as if the layers in between added nothing. They do add something, and much of it
is the same for every token or linear in the state. A translator adds that part: ``x + s (shift + (n @ down) @ up)``
with ``s`` the root mean square of x and ``n = x / s``. It is an affine translator as in the tuned lens (Belrose et al.
2023, arXiv:2303.08112), but low-rank and between layers. All layers behind an exit point share one `down`.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from tide_jax.model.ops import einsum


class LayerTranslators(NamedTuple):
    """Translators to one layer's input, from each of the C' exit points at least two layers before it.

    Attributes:
      shift: added to every token, in units of the exit state's root mean square.
      up: maps the code (see `Translators.code`) to what is added, in the same units.
    """

    shift: Float[Array, "C' D"]
    up: Float[Array, "C' R D"]


class Translators(NamedTuple):
    """Translators of a model: a pytree.

    Attributes:
      down: one map ``[D, R]`` for each exit point; R may be 0.
      layers: one entry for each layer of the model; None for layers without an exit point at least two layers before
        them (the layer right after an exit point reads the exit state itself).
    """

    down: tuple[Float[Array, "D R"], ...]
    layers: tuple[LayerTranslators | None, ...]

    @property
    def rank(self) -> int:
        """Rank R: channels of a code."""
        return self.down[0].shape[1]

    def code(self, exit_point: int, x: Float[Array, "B T D"], *, eps: float) -> Float[Array, "B T R"]:
        """Low-rank code of exit states at exit point `exit_point`, in x's dtype; all later layers read it."""
        normed = (x.astype(jnp.float32) * lax.rsqrt(_mean_square(x) + eps)).astype(x.dtype)
        return einsum("btd,dr->btr", normed, self.down[exit_point].astype(x.dtype))

    def translate(
        self,
        layer: int,
        x: Float[Array, "B T D"],
        code: Float[Array, "B T R"],
        exit_point: Int[Array, "B T"],
        *,
        eps: float,
    ) -> Float[Array, "B T D"]:
        """Estimated input of `layer` for tokens that exited at exit point `exit_point` with state `x`.

        Tokens that exited right before the layer, or at a number without a translator for it, keep x.
        """
        entry = self.layers[layer]
        if entry is None:
            return x
        count = entry.shift.shape[0]
        known = (exit_point >= 0) & (exit_point < count)
        added = self._translation(entry, code, jnp.clip(exit_point, 0, count - 1))
        scale = jnp.sqrt(_mean_square(x) + eps)
        return jnp.where(known[:, :, None], x + (scale * added).astype(x.dtype), x)

    def _translation(self, entry: LayerTranslators, code: Array, exit_point: Array) -> Float[Array, "B T D"]:
        shift = jnp.take(entry.shift.astype(jnp.float32), exit_point, axis=0, mode="clip")
        if self.rank == 0:
            return shift
        up = entry.up.astype(code.dtype)
        if exit_point.size <= up.shape[0]:  # for few tokens, read only the matrices they need
            chosen = jnp.take(up, exit_point, axis=0, mode="clip")
            return shift + einsum("btr,btrd->btd", code, chosen).astype(jnp.float32)
        # For many tokens, one product: put each code into the block of its exit point, zeros elsewhere.
        mine = exit_point[:, :, None, None] == jnp.arange(up.shape[0], dtype=jnp.int32)[None, None, :, None]
        spread = jnp.where(mine, code[:, :, None, :], jnp.zeros((), code.dtype))
        spread = spread.reshape(*exit_point.shape, -1)
        return shift + einsum("btr,rd->btd", spread, up.reshape(-1, up.shape[-1])).astype(jnp.float32)


def _mean_square(x: Float[Array, "B T D"]) -> Float[Array, "B T 1"]:
    return jnp.mean(jnp.square(x.astype(jnp.float32)), axis=-1, keepdims=True)
