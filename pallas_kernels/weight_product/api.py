"""Entry point of the weight product: picks an implementation, or raises with the reason it can't run."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8

from pallas_kernels.selection import Choices, platform
from pallas_kernels.weight_product import reference
from pallas_kernels.weight_product.reference import Product

logger = logging.getLogger(__name__)
_OFF = jax.make_user_context(default_value=False)  # programs traced inside and outside are kept apart
IMPLEMENTATIONS = Choices("weight_product", ("reference", "llvm"), ())
"""Plain JAX; a kernel for CPUs that LLVM compiles for the machine at hand."""
MOST_ROWS = 16
"""Rows that the kernel for CPUs takes: XLA's product of matrices is faster from there on."""


def weight_product(
    x: Float[Array, "R K"],
    weights: Float[Array, "N K"] | Int8[Array, "N K"],
    scale: Float[Array, " N"] | None = None,
    *,
    implementation: str | None = None,
) -> Float[Array, "R N"]:
    """Multiplies a few rows by weights in the order in which checkpoints store them, an output a row.

    Args:
      x: the rows. The kernel for CPUs takes float32, and at most `MOST_ROWS`.
      weights: of x's dtype, or 8-bit integers.
      scale: float32 factor of each output; 8-bit weights need it.
      implementation: a name from `IMPLEMENTATIONS`; None takes the reference.

    Returns:
      ``out[r, n] = scale[n] * sum_k x[r, k] weights[n, k]``. With "llvm" a row has the same bits whatever rows stand
      beside it.

    Raises:
      ValueError: the implementation that was named can't run here, or the arguments do not fit, with the reason.
    """
    return weight_products(x, ((weights, scale),), implementation=implementation)[0]


def weight_products(
    x: Float[Array, "R K"], products: Sequence[Product], *, implementation: str | None = None
) -> tuple[Float[Array, "R N"], ...]:
    """Several products of the same rows, such as queries, keys and values: one call on a CPU, where a call costs
    microseconds. Each product is a pair of weights and scale; see `weight_product`."""
    for weights, scale in products:
        if (weights.dtype == jnp.int8) != (scale is not None):
            raise ValueError(
                f"weight_product: int8 weights need a scale, and others have none; these are {weights.dtype}"
            )
    name = IMPLEMENTATIONS.choose(implementation, lambda _: misfit(x, products))
    if name == "reference":
        return tuple(reference.weight_product(x, weights, scale) for weights, scale in products)
    from pallas_kernels.weight_product import llvm

    return llvm.weight_products(x, tuple(products))


def pays(x: Float[Array, "R K"], products: Sequence[Product]) -> bool:
    """Whether "llvm" takes these arguments here. Where it is the machine that stands in the way, a log line says so."""
    if platform() != "cpu" or _unlike(x, products) is not None or _OFF.value:
        return False
    reason = IMPLEMENTATIONS.refusal("llvm") or _unavailable()
    if reason is not None:
        _say_once(reason)
    return reason is None


def turned_off() -> contextlib.AbstractContextManager[None]:
    """Inside, `pays` is False: for programs that are compared with XLA's own products."""
    return _OFF(True)


def misfit(x: Float[Array, "R K"], products: Sequence[Product]) -> str | None:
    """Why the kernel for CPUs can't run these arguments here; None where it can."""
    if platform() != "cpu":
        return f"weight_product: 'llvm' runs on a CPU, this process computes on a {platform()}"
    return _unlike(x, products) or _unavailable()


def _unlike(x: Float[Array, "R K"], products: Sequence[Product]) -> str | None:
    """What about the arguments the kernel for CPUs does not take."""
    for weights, _ in products:
        if x.dtype != jnp.float32 or weights.dtype not in (jnp.float32, jnp.int8):
            return f"weight_product: 'llvm' multiplies float32 by float32 or int8, got {x.dtype} and {weights.dtype}"
        if not 1 <= x.shape[0] <= MOST_ROWS or 0 in weights.shape:
            return (
                f"weight_product: 'llvm' takes 1 to {MOST_ROWS} rows and no empty weights, got {x.shape}, "
                f"{weights.shape}"
            )
    return None


def _unavailable() -> str | None:
    from pallas_kernels.weight_product import llvm

    return llvm.unavailable()


@functools.cache
def _say_once(reason: str) -> None:
    logger.warning("XLA's own products are used, which are slower (the extra 'cpu' brings others): %s", reason)
