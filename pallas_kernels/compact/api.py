"""Entry points of the compaction: pick an implementation, or raise with the reason it can't run."""

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
"""Plain JAX; Pallas kernels, and the same run by XLA anywhere, for tests; their twins in Triton's own language."""


def partition(active: Bool[Array, "B N"]) -> Partition:
    """Where the active rows are, and where each row goes: a stable partition of each batch entry.

    Left to XLA everywhere: it reads N bytes and writes 8 N once for each checkpoint, where gathering and scattering
    move D numbers a row, and beyond one block a kernel would need a second one for the blocks' offsets.
    """
    return reference.partition(active)


def gather_rows(
    x: Shaped[Array, "B N D"], rows: Partition, size: int, *, implementation: str | None = None
) -> Shaped[Array, "B M D"]:
    """Brings the active rows of each batch entry together.

    Args:
      x: any dtype; kernels take float32, float16 and bfloat16. Rows that are not active may hold anything.
      rows: from `partition`.
      size: M, rows to return, 1 to N; a batch entry with more active rows loses those past it.
      implementation: a name from `IMPLEMENTATIONS`; None takes the reference and, once a GPU has found the
        kernels right (`Choices.proven`), on a GPU the first that can be imported and takes these shapes; without one,
        the reference, with a warning in the log.

    Returns:
      The active rows in their order, then zeros, in x's dtype.

    Raises:
      ValueError: `size` is out of range, or the implementation that was named can't run here, with the reason.
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
    """Puts rows that `gather_rows` brought together back in their places.

    Args:
      compacted: rows in the order of `gather_rows`; those past the active ones may hold anything.
      rows: from `partition`.
      out: takes the active rows; its other rows stay as they are. Donate it where its old values are not needed.
      implementation: as in `gather_rows`.

    Returns:
      Rows of out's dtype.

    Raises:
      ValueError: there are more compacted rows than places, or the implementation that was named can't run here.
    """
    _check(compacted.shape[1], out.shape[1])
    name = IMPLEMENTATIONS.choose(implementation, lambda _: misfit(out, compacted.shape[1], compacted))
    return _function("scatter_rows", name)(compacted, rows, out)


def _check(size: int, rows: int) -> None:
    if not 1 <= size <= rows:
        raise ValueError(f"compact: {size} rows can't be taken out of {rows}; expected 1 to {rows}")


def _function(operation: str, name: str) -> Callable[..., Shaped[Array, "B M D"]]:
    """Imports what an implementation needs, and only that."""
    if name == "reference":
        return getattr(reference, operation)
    if name == "triton":
        from pallas_kernels.compact import triton

        return getattr(triton, operation)
    from pallas_kernels.compact import pallas_triton

    return functools.partial(getattr(pallas_triton, operation), interpret=name == "pallas_interpret")
