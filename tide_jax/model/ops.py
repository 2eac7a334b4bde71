"""Matrix products under the project's precision rule, and the Dense module built on them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float, Int, Int8, Shaped

from pallas_kernels import weight_product
from tide_jax.model.rounding import apply_scale, as_floats
from tide_jax.model.sharding import on_mesh

T = TypeVar("T", Array, np.ndarray)
_FEW_TOKENS = 32
_INTEGERS_AT_ONCE = 2**18  # for a few tokens: weights whose floats fit into a CPU's cache
_INTEGERS_OF_PROMPTS = 2**24  # for many tokens, where a loop costs more than it saves: 64 MiB of floats


def matmul_precision(dtype: jnp.dtype) -> lax.Precision | None:
    """float32 products use float32; by default, GPUs would use TF32 (10-bit mantissas)."""
    return lax.Precision.HIGHEST if dtype == jnp.float32 else None


def einsum(spec: str, a: Float[Array, "..."], b: Float[Array, "..."]) -> Float[Array, "..."]:
    """`jnp.einsum` of two operands under the precision rule: float32 sums, in a's dtype at the end.

    XLA for GPUs turns the product of one token into a sum of products, and would round each product to 16 bits.
    """
    out = jnp.einsum(spec, a, b, precision=matmul_precision(a.dtype), preferred_element_type=_sum_dtype(a.dtype))
    return out.astype(a.dtype)


def _sum_dtype(dtype: jnp.dtype) -> jnp.dtype | None:
    """float32 for 16-bit operands; None for others, which are summed in their own dtype."""
    return jnp.dtype(jnp.float32) if dtype.itemsize == 2 else None


def integer_sums(spec: str, x: Float[Array, "..."], integers: Int8[Array, "..."]) -> Float[Array, "..."]:
    """`jnp.einsum` of floats and 8-bit integers with float32 sums; float16 sums could overflow before scaling.

    The barrier stops XLA for CPUs from converting the integers to floats before an enclosing loop. Accelerators convert
    inside the product. They get no barrier, because it would separate a kernel from its reshape, and a TPU would then
    copy the kernel.
    """
    x, integers = lax.platform_dependent(x, integers, cpu=_keep_here, default=lambda *as_given: as_given)
    precision = matmul_precision(x.dtype)
    return jnp.einsum(spec, x, integers.astype(x.dtype), precision=precision, preferred_element_type=jnp.float32)


def _keep_here(x: Array, integers: Array) -> tuple[Array, Array]:
    return lax.optimization_barrier((x, integers))


def matmul(x: Float[Array, "... D"], kernel: Float[Array, "D ..."]) -> Float[Array, "..."]:
    """`x` times a kernel with any number of output axes, under the precision rule of `einsum`."""
    precision, sums = matmul_precision(x.dtype), _sum_dtype(x.dtype)
    return jnp.tensordot(x, kernel, axes=1, precision=precision, preferred_element_type=sums).astype(x.dtype)


def times_rows(
    x: Float[Array, "... D"], rows: Float[Array, "F D"] | Int8[Array, "F D"], scale: Float[Array, " F"] | None = None
) -> Float[Array, "... F"]:
    """`x` times every row of a matrix, under the precision rule.

    On a CPU, a few float32 tokens go through `pallas_kernels.weight_product`, which reads weights at memory speed.

    Args:
      rows: a row for each output, in x's dtype or 8-bit integers.
      scale: float32 factor of each row of integers.
    """
    return times_rows_of(x, [(rows, scale)])[0]


def times_rows_of(x: Float[Array, "... D"], products: Sequence[weight_product.Product]) -> list[Float[Array, "... F"]]:
    """`times_rows` for several matrices, in one kernel call, because each call costs microseconds."""
    flat = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    if not on_mesh() and weight_product.pays(flat, products):
        found = weight_product.weight_products(flat, products, implementation="llvm")
        return [out.reshape(*x.shape[:-1], out.shape[-1]) for out in found]
    joins = len(products) > 2 and flat.shape[0] > 1
    return [
        _integer_product(x, rows, scale)
        if scale is not None
        else _float_product(*(_apart if joins else _as_is)(x, rows))
        for rows, scale in products
    ]


def _as_is(x: Array, rows: Array) -> tuple[Array, Array]:
    return x, rows


def _apart(x: Float[Array, "... D"], rows: Float[Array, "F D"]) -> tuple[Array, Array]:
    """On a GPU, the factors of a product that stays one.

    XLA would join three products of one array and more, and for that concatenate their weights at every step.
    """
    return lax.platform_dependent(x, rows, cuda=_keep_here, default=_as_is)


def _integer_product(
    x: Float[Array, "... D"], rows: Int8[Array, "F D"], scale: Float[Array, " F"]
) -> Float[Array, "... F"]:
    sums = _integer_sums_of_rows(x.reshape(math.prod(x.shape[:-1]), x.shape[-1]), rows)
    return apply_scale(sums, scale[None, :], x.dtype).reshape(*x.shape[:-1], rows.shape[0])


def _integer_sums_of_rows(x: Float[Array, "T D"], rows: Int8[Array, "F D"]) -> Float[Array, "T F"]:
    """float32 sums of the product with integers, computed by XLA.

    XLA's CPU backend converts the integers to floats in memory, for all layers at the start of a program. That would
    take as much memory as the float model. So on a CPU a loop converts some rows at a time.
    """
    at_most = _INTEGERS_AT_ONCE if x.shape[0] <= _FEW_TOKENS else _INTEGERS_OF_PROMPTS
    outputs, size = rows.shape[0], max(1, at_most // rows.shape[1])

    def at_once(x: Float[Array, "T D"], rows: Int8[Array, "F D"]) -> Float[Array, "T F"]:
        return integer_sums("td,fd->tf", x, rows)

    if outputs <= size or on_mesh():
        return at_once(x, rows)

    def in_blocks(x: Float[Array, "T D"], rows: Int8[Array, "F D"]) -> Float[Array, "T F"]:
        def block(number: Int[Array, ""], sums: Float[Array, "T F"]) -> Float[Array, "T F"]:
            # The last block overlaps the one before, so that all have the same size.
            start = jnp.minimum(number.astype(jnp.int32) * jnp.int32(size), jnp.int32(outputs - size))
            part = at_once(x, lax.dynamic_slice_in_dim(rows, start, size))
            return lax.dynamic_update_slice_in_dim(sums, part, start, axis=1)

        empty = jnp.zeros((x.shape[0], outputs), jnp.float32)
        return lax.fori_loop(0, -(-outputs // size), block, empty)

    return lax.platform_dependent(x, rows, cpu=in_blocks, default=at_once)


def _float_product(x: Float[Array, "... D"], rows: Float[Array, "F D"]) -> Float[Array, "... F"]:
    """The product with floats, computed by XLA.

    XLA's CPU backend multiplies one token by a matrix on one thread, and two to eight tokens by a wide matrix slowly,
    but it distributes the members of a batch over threads. So on a CPU the rows become a small batch of matrices. On
    two cores that is 15 to 45 % faster for one token and up to 50 % faster for a few; from dozens of tokens on it gains
    nothing.
    """
    tokens = math.prod(x.shape[:-1])
    parts = 4 if tokens == 1 else 2 if tokens <= _FEW_TOKENS else 1

    def at_once() -> Float[Array, "... F"]:
        return einsum("...d,fd->...f", x, rows)

    if parts == 1 or rows.shape[0] % parts or x.dtype != jnp.float32 or on_mesh():
        return at_once()

    def in_parts() -> Float[Array, "... F"]:
        copies = jnp.broadcast_to(x.reshape(1, tokens, x.shape[-1]), (parts, tokens, x.shape[-1]))
        products = einsum("ptd,pfd->ptf", copies, rows.reshape(parts, -1, rows.shape[1]))
        return jnp.moveaxis(products, 0, 1).reshape(*x.shape[:-1], rows.shape[0])

    return lax.platform_dependent(cpu=in_parts, default=at_once)


def in_order(rows: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
    """On a GPU, an array that lies in memory in the order of its axes: rows to write into a cache, or read from it.

    XLA lays out an array like what is written into it or cut out of it. In a loop that carries the cache, it would take
    the order that suits a product's rows, and transpose all of the cache before and after.
    """
    return lax.platform_dependent(rows, cuda=_in_order, default=lambda rows: rows)


def _in_order(rows: Array) -> Array:
    return with_layout_constraint(rows, Layout(tuple(range(rows.ndim))))


def likeliest(logits: Float[Array, "... V"]) -> Int[Array, "..."]:
    """`jnp.argmax` over the last axis, int32: the first of equal maxima, or the first NaN if there is one.

    XLA's CPU backend carries values and indices along one by one; two passes over the values are eight times as fast.
    """
    return lax.platform_dependent(
        logits, cpu=_first_of_largest, default=lambda x: jnp.argmax(x, axis=-1).astype(jnp.int32)
    )


def _first_of_largest(logits: Float[Array, "... V"]) -> Int[Array, "..."]:
    largest = jnp.max(logits, axis=-1, keepdims=True)
    here = (logits == largest) | jnp.isnan(logits)
    place = lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    return jnp.min(jnp.where(here, place, jnp.int32(logits.shape[-1] - 1)), axis=-1)


def normal(rngs: nnx.Rngs, shape: tuple[int, ...], fan_in: int, dtype: jnp.dtype) -> Array:
    """Random weights with standard deviation ``1 / sqrt(fan_in)``."""
    return (jax.random.normal(rngs.params(), shape, jnp.float32) / math.sqrt(fan_in)).astype(dtype)


class Dense(nnx.Module):
    """Linear map from the trailing axes `inputs` to axes `outputs`.

    The kernel's known shape is ``inputs + outputs`` (`tide_jax.model.decoder.parameters`). It is stored as ``outputs +
    inputs``, one row per output. With this order a CPU multiplies 4 to 16 tokens up to a quarter faster, and one token
    equally fast.

    The kernel may be 8-bit integers (`tide_jax.model.rounding`); then `scale` holds a float32 factor for each of
    `outputs`.

    Args:
      stacked: the first of two output axes counts separate maps; devices split each map along the second axis.
      exact: the kernel stays float even if other kernels are rounded.
    """

    def __init__(
        self,
        inputs: tuple[int, ...],
        outputs: tuple[int, ...],
        *,
        bias: bool,
        stacked: bool = False,
        exact: bool = False,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ) -> None:
        self.inputs, self.outputs, self.stacked = inputs, outputs, stacked
        kernel = normal(rngs, inputs + outputs, math.prod(inputs), dtype)
        summed = None if exact else tuple(range(len(outputs), kernel.ndim))
        self.kernel = nnx.Param(to_storage_order(kernel, len(inputs)), input_axes=len(inputs), summed=summed)
        self.scale: nnx.Param | None = None
        self.bias = nnx.Param(jnp.zeros(outputs, dtype)) if bias else None

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        # Flattening would merge the stacking axis with the axis that devices split, and every step would move the
        # weights.
        if self.stacked and on_mesh():
            return self._add_bias(self._one_by_one(self._flat(x)))
        return together(x, [self])[0]

    def weights(self, dtype: jnp.dtype) -> Float[Array, "..."]:
        """The kernel as floats, ``outputs + inputs``, for callers that do not multiply by it row by row."""
        return as_floats(self.kernel, self.scale, dtype)

    def _flat(self, x: Float[Array, "..."]) -> Float[Array, "... D"]:
        return x.reshape(*x.shape[: x.ndim - len(self.inputs)], math.prod(self.inputs))

    def _product(self) -> weight_product.Product:
        """The kernel as a matrix with a row for each output, and the rows' scales."""
        rows = self.kernel[...].reshape(math.prod(self.outputs), math.prod(self.inputs))
        return rows, None if self.scale is None else self.scale[...].reshape(-1)

    def _to_outputs(self, y: Float[Array, "... F"]) -> Float[Array, "..."]:
        return self._add_bias(y.reshape(*y.shape[:-1], *self.outputs))

    def _add_bias(self, y: Float[Array, "..."]) -> Float[Array, "..."]:
        if self.bias is None:
            return y
        return y + self.bias[...].reshape((1,) * (y.ndim - len(self.outputs)) + self.outputs)

    def _one_by_one(self, x: Float[Array, "... D"]) -> Float[Array, "..."]:
        rows, tokens = self.kernel[...], x.reshape(-1, x.shape[-1])
        each = jnp.broadcast_to(tokens, (rows.shape[0], *tokens.shape))
        if self.scale is None:
            maps = einsum("gnd,gfd->gnf", each, rows)
        else:
            maps = apply_scale(integer_sums("gnd,gfd->gnf", each, rows), self.scale[...][:, None, :], x.dtype)
        return jnp.moveaxis(maps, 0, 1).reshape(*x.shape[:-1], *self.outputs)


def together(x: Float[Array, "..."], maps: Sequence[Dense]) -> list[Float[Array, "..."]]:
    """Several maps of the same input, such as queries and keys; none of them may be stacked on a mesh."""
    products = times_rows_of(maps[0]._flat(x), [dense._product() for dense in maps])
    return [dense._to_outputs(y) for dense, y in zip(maps, products, strict=True)]


def storage_order(ndim: int, inputs: int) -> tuple[int, ...]:
    """Permutation of axes from a kernel's known order ``inputs + outputs`` to its stored order ``outputs + inputs``."""
    return (*range(inputs, ndim), *range(inputs))


def to_storage_order(kernel: T, inputs: int) -> T:
    """``inputs + outputs`` -> ``outputs + inputs``, for a numpy or JAX array whose first `inputs` axes are inputs."""
    return kernel.transpose(storage_order(kernel.ndim, inputs))


def from_storage_order(kernel: T, inputs: int) -> T:
    """Inverse of `to_storage_order`."""
    return to_storage_order(kernel, kernel.ndim - inputs)


def scaled(x: Float[Array, "..."], scale: float) -> Float[Array, "..."]:
    """A multiple of `x`. In float32, because the error of a rounded scale would accumulate over layers."""
    return x if scale == 1.0 else (x.astype(jnp.float32) * scale).astype(x.dtype)
