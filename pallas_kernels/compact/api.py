"""Entry points of the compaction: each picks an implementation, or raises with the reason it can't run."""

from __future__ import annotations

import functools
from collections.abc import Callable

from jaxtyping import Array, Bool, Shaped

from pallas_kernels.compact import reference
from pallas_kernels.compact.reference import Partition
from pallas_kernels.compact.shapes import misfit
from pallas_kernels.selection import Choices

IMPLEMENTATIONS = Choices(
    "compact", ("reference", "pallas_triton", "pallas_interpret", "triton"), ("pallas_triton", "triton")
)
"""Plain JAX; Pallas kernels; the same kernels run by XLA anywhere, for tests; kernels in Triton's own language."""


def partition(active: Bool[Array, "B N"]) -> Partition:
    """Stable partition of each batch entry into active rows and others.

    XLA computes it on every platform. It reads N bytes and writes 8 N once per exit point, while gathering and
    scattering move D numbers per row. For more than one block, a kernel would also need a second kernel for the blocks'
    offsets.
    """
    return reference.partition(active)


def gather_rows(
    x: Shaped[Array, "B N D"], rows: Partition, size: int, *, implementation: str | None = None
) -> Shaped[Array, "B M D"]:
    """Gathers the active rows of each batch entry.

    Args:
      x: any dtype; kernels take float32, float16 and bfloat16. Inactive rows may hold anything.
      rows: from `partition`.
      size: M, number of rows to return, 1 to N. A batch entry with more active rows loses the rest.
      implementation: a name from `IMPLEMENTATIONS`. None chooses the reference, except on a GPU with proven kernels
        (`Choices.proven`): there it chooses the first one that can be imported and takes these shapes, or else the
        reference, with a warning in the log.

    Returns:
      The active rows in their order, then zeros, in x's dtype.

    Raises:
      ValueError: `size` is out of range, or the named implementation can't run here; the message has the reason.
    """
    _check(size, x.shape[1])
    return _function("gather_rows", IMPLEMENTATIONS.choose(implementation, lambda _: misfit(x, size)))(x, rows, size)


def scatter_rows(
    compacted: Shaped[Array, "B M D"],
    rows: Partition,
    out: Shaped[Array, "B N D"],
    *,
    implementation: str | None = None,
) -> Shaped[Array, "B N D"]:
    """Scatters rows from `gather_rows` back to their places.

    Args:
      compacted: rows in the order of `gather_rows`; rows after the active ones may hold anything.
      rows: from `partition`.
      out: receives the active rows; its other rows stay unchanged. Donate it if its old values are not needed.
      implementation: as in `gather_rows`.

    Returns:
      Rows in out's dtype.

    Raises:
      ValueError: there are more compacted rows than places, or the named implementation can't run here.
    """
    _check(compacted.shape[1], out.shape[1])
    name = IMPLEMENTATIONS.choose(implementation, lambda _: misfit(out, compacted.shape[1], compacted))
    return _function("scatter_rows", name)(compacted, rows, out)


def _check(size: int, rows: int) -> None:
    if not 1 <= size <= rows:
        raise ValueError(f"compact: {size} rows can't be taken out of {rows}; expected 1 to {rows}")


def _function(operation: str, name: str) -> Callable[..., Shaped[Array, "B M D"]]:
    """Imports only the module that the implementation needs."""
    if name == "reference":
        return getattr(reference, operation)
    if name == "triton":
        from pallas_kernels.compact import triton

        return getattr(triton, operation)
    from pallas_kernels.compact import pallas_triton

    return functools.partial(getattr(pallas_triton, operation), interpret=name == "pallas_interpret")
