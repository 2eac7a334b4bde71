"""Entry point of the cache fill: picks an implementation, or raises with the reason it can't run."""

from __future__ import annotations

import functools
from collections.abc import Callable

from jaxtyping import Array, Bool, Float

from pallas_kernels.kv_fill import reference
from pallas_kernels.kv_fill.reference import InputNorm, KVRows, Projection, Rotary, Settings
from pallas_kernels.kv_fill.shapes import misfit
from pallas_kernels.selection import Choices

IMPLEMENTATIONS = Choices(
    "kv_fill", ("reference", "pallas_triton", "pallas_interpret", "triton"), ("pallas_triton", "triton")
)
"""Plain JAX; a Pallas kernel, and the same run by XLA on any platform, for tests; its twin in Triton's own language."""


def kv_fill(
    x: Float[Array, "B T D"],
    norm: InputNorm,
    projection: Projection,
    rotary: Rotary | None,
    fill: Bool[Array, "B T"],
    out: KVRows,
    *,
    settings: Settings,
    implementation: str | None = None,
) -> KVRows:
    """Projects what a layer would have read of tokens to the keys and values it would have stored.

    This is state propagation (CALM, Schuster et al. 2022, arXiv:2207.07061, section 3.3) for grouped-query attention
    with an optional key norm (before the rotation) and full or partial rotary embedding.

    Args:
      x: what the layer reads, any float dtype; the kernel takes float32, float16 and bfloat16.
      norm: parameters of the norm in front of the projection, any float dtype.
      projection: the layer's weights, of x's dtype.
      rotary: tables of the tokens' true positions; None without rotary embedding.
      fill: tokens whose rows are written.
      out: takes their rows; the others stay as they are. Donate it where its old values are not needed.
      settings: the layer's static facts.
      implementation: a name from `IMPLEMENTATIONS`; None takes the reference and, once a GPU has found the
        kernels right (`Choices.proven`), on a GPU the first that can be imported and takes these shapes; without one,
        the reference, with a warning in the log.

    Returns:
      Rows of out's dtypes.

    Raises:
      ValueError: the implementation that was named can't run here, with the reason.
    """
    name = IMPLEMENTATIONS.choose(implementation, lambda _: misfit(x, projection, rotary, out))
    return _function(name)(x, norm, projection, rotary, fill, out, settings=settings)


def _function(name: str) -> Callable[..., KVRows]:
    """Imports what an implementation needs, and only that."""
    if name == "reference":
        return reference.kv_fill
    if name == "triton":
        from pallas_kernels.kv_fill import triton

        return triton.kv_fill
    from pallas_kernels.kv_fill import pallas_triton

    return functools.partial(pallas_triton.kv_fill, interpret=name == "pallas_interpret")
