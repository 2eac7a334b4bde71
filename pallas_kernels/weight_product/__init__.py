"""Products of a few rows with stored weights, where a decode step spends its time."""

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

__all__ = ["IMPLEMENTATIONS", "MOST_ROWS", "Product", "kernel_off", "pays", "weight_product", "weight_products"]

logger = logging.getLogger(__name__)
_OFF = jax.make_user_context(default_value=False)  # part of jit's cache key: programs traced with and without it differ
IMPLEMENTATIONS = Choices("weight_product", ("reference", "llvm"), ())
"""Plain JAX; a CPU kernel that LLVM compiles for the current machine."""
MOST_ROWS = 32
"""Most rows that the CPU kernel takes; for more, XLA's matrix product is faster."""


def weight_product(
    x: Float[Array, "R K"],
    weights: Float[Array, "N K"] | Int8[Array, "N K"],
    scale: Float[Array, " N"] | None = None,
    *,
    implementation: str | None = None,
) -> Float[Array, "R N"]:
    """Multiplies a few rows by weights in the order of checkpoints, one row per output.

    Args:
      x: the rows. The CPU kernel takes float32 and at most `MOST_ROWS`.
      weights: in x's dtype, or 8-bit integers.
      scale: float32 factor of each output; required for 8-bit weights.
      implementation: a name from `IMPLEMENTATIONS`; None chooses the reference.

    Returns:
      ``out[r, n] = scale[n] * sum_k x[r, k] weights[n, k]``. With "llvm", a row's bits do not depend on the other rows.

    Raises:
      ValueError: the named implementation can't run here, or the arguments do not fit; the message has the reason.
    """
    return weight_products(x, ((weights, scale),), implementation=implementation)[0]


def weight_products(
    x: Float[Array, "R K"], products: Sequence[Product], *, implementation: str | None = None
) -> tuple[Float[Array, "R N"], ...]:
    """Several products of the same rows, such as queries, keys and values, in one call.

    On a CPU each call costs microseconds. Each product is a pair of weights and scale; see `weight_product`.
    """
    for weights, scale in products:
        if (weights.dtype == jnp.int8) != (scale is not None):
            raise ValueError(
                f"weight_product: int8 weights need a scale, and others have none; these are {weights.dtype}"
            )
    name = IMPLEMENTATIONS.choose(implementation, lambda _: _refusal(x, products), x.shape[0])
    if name == "reference":
        return tuple(reference.weight_product(x, weights, scale) for weights, scale in products)
    from pallas_kernels.weight_product import llvm

    return llvm.weight_products(x, tuple(products))


def pays(x: Float[Array, "R K"], products: Sequence[Product]) -> bool:
    """Whether "llvm" can run these arguments here; logs the reason once if the machine prevents it."""
    if platform() != "cpu" or _argument_refusal(x, products) is not None or _OFF.value:
        return False
    reason = IMPLEMENTATIONS.refusal("llvm") or _machine_refusal()
    if reason is not None:
        _warn_once(reason)
    return reason is None


def kernel_off() -> contextlib.AbstractContextManager[None]:
    """Context in which `pays` is False, for programs that are compared with XLA's own products."""
    return _OFF(True)


def _refusal(x: Float[Array, "R K"], products: Sequence[Product]) -> str | None:
    """Reason why the CPU kernel can't run these arguments here; None if it can."""
    if platform() != "cpu":
        return f"weight_product: 'llvm' runs on a CPU, this process computes on a {platform()}"
    return _argument_refusal(x, products) or _machine_refusal()


def _argument_refusal(x: Float[Array, "R K"], products: Sequence[Product]) -> str | None:
    """Reason why the CPU kernel does not take the arguments, on any machine; None if it does."""
    for weights, _ in products:
        if x.dtype != jnp.float32 or weights.dtype not in (jnp.float32, jnp.int8):
            return f"weight_product: 'llvm' multiplies float32 by float32 or int8, got {x.dtype} and {weights.dtype}"
        if not 1 <= x.shape[0] <= MOST_ROWS or 0 in weights.shape:
            return (
                f"weight_product: 'llvm' takes 1 to {MOST_ROWS} rows and no empty weights, got {x.shape}, "
                f"{weights.shape}"
            )
    return None


def _machine_refusal() -> str | None:
    from pallas_kernels.weight_product import llvm

    return llvm.refusal()


@functools.cache
def _warn_once(reason: str) -> None:
    logger.warning("XLA's own products are used, which are slower (the extra 'cpu' brings others): %s", reason)
