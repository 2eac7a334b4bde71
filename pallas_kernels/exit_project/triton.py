"""Exit projection in Triton's own language, called through jax_triton. Importing this needs triton."""

from __future__ import annotations

import jax
import triton
import triton.language as tl
from jaxtyping import Array, Bool, Float

from pallas_kernels import jax_triton_call
from pallas_kernels.common import NormSettings, NormWeights, power_of_two, row_warps
from pallas_kernels.exit_project.reference import AffineHead, head_product


def exit_project(
    x: Float[Array, "N D"],
    head: AffineHead | None,
    final_norm: NormWeights,
    exits: Bool[Array, " N"],
    out: Float[Array, "N D"],
    *,
    settings: NormSettings,
) -> Float[Array, "N D"]:
    """Same result as the reference within rounding.

    Rows that do not exit are copied, because each release of jax_triton has a different interface for outputs that
    alias inputs.
    """
    rows, size = x.shape
    block = power_of_two(size)
    # A missing parameter still needs a pointer; the kernel never reads it.
    product, bias = (x, x) if head is None else (head_product(x, head, settings.eps), head.bias)
    parameters = tuple(x if parameter is None else parameter for parameter in final_norm)
    constants = {"D": size, "BLOCK": block, "SIZE": float(size), "HEAD": head is not None}
    constants |= {"EPS": settings.eps, "NORM": settings.kind, "OFFSET": float(settings.unit_offset)}
    constants |= {"SCALE": final_norm.scale is not None, "BIAS": final_norm.bias is not None}
    outputs = (jax.ShapeDtypeStruct(out.shape, out.dtype),)
    inputs = x, exits, out, product, bias, *parameters
    (found,) = jax_triton_call.run(_kernel, inputs, outputs, grid=(rows,), warps=row_warps(block), constants=constants)
    return found


@triton.jit
def _kernel(
    x, exits, out, product, head_bias, scale, bias, found,
    D: tl.constexpr, BLOCK: tl.constexpr, SIZE: tl.constexpr, EPS: tl.constexpr, HEAD: tl.constexpr,
    NORM: tl.constexpr, OFFSET: tl.constexpr, SCALE: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    row, columns = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    at, inside = row * D + columns, columns < D
    if tl.load(exits + row) != 0:
        y = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        if HEAD:
            y = y * tl.rsqrt(tl.sum(y * y, axis=0) / SIZE + EPS)
            y += tl.load(product + at, mask=inside, other=0.0).to(tl.float32)
            y += tl.load(head_bias + columns, mask=inside, other=0.0).to(tl.float32)
            y = y.to(x.dtype.element_ty).to(tl.float32)
        if NORM == "layer":
            y = tl.where(inside, y - tl.sum(y, axis=0) / SIZE, 0.0)
        if NORM != "none":
            y = y * tl.rsqrt(tl.sum(y * y, axis=0) / SIZE + EPS)
            if SCALE:
                y = y * (OFFSET + tl.load(scale + columns, mask=inside, other=0.0).to(tl.float32))
            if BIAS:
                y += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
        tl.store(found + at, y.to(found.dtype.element_ty), mask=inside)
    else:
        tl.store(found + at, tl.load(out + at, mask=inside, other=0.0), mask=inside)
