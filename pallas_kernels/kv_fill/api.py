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
"""Plain JAX; a Pallas kernel; the same kernel run by XLA anywhere, for tests; a kernel in Triton's own language."""


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
    """Projects a layer's inputs to the keys and values that the layer would have stored.

    This is state propagation (CALM, Schuster et al. 2022, arXiv:2207.07061, section 3.3). It supports grouped-query
    attention with an optional key norm (before the rotation) and full or partial rotary embedding.

    Args:
      x: the layer's inputs, any float dtype; the kernel takes float32, float16 and bfloat16.
      norm: parameters of the norm before the projection, any float dtype.
      projection: the layer's weights, in x's dtype.
      rotary: tables for the tokens' true positions; None without rotary embedding.
      fill: tokens whose keys and values are written.
      out: receives their keys and values; those of other tokens stay unchanged. Donate it if its old values are not
        needed.
      settings: the layer's static settings.
      implementation: a name from `IMPLEMENTATIONS`. None chooses the reference, except on a GPU with proven kernels
        (`Choices.proven`): there it chooses the first one that can be imported and takes these shapes, or else the
        reference, with a warning in the log.

    Returns:
      Keys and values in out's dtypes.

    Raises:
      ValueError: the named implementation can't run here; the message has the reason.
    """
    name = IMPLEMENTATIONS.choose(implementation, lambda _: misfit(x, projection, rotary, out))
    return _function(name)(x, norm, projection, rotary, fill, out, settings=settings)


def _function(name: str) -> Callable[..., KVRows]:
    """Imports only the module that the implementation needs."""
    if name == "reference":
        return reference.kv_fill
    if name == "triton":
        from pallas_kernels.kv_fill import triton

        return triton.kv_fill
    from pallas_kernels.kv_fill import pallas_triton

    return functools.partial(pallas_triton.kv_fill, interpret=name == "pallas_interpret")
