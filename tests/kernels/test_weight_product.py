"""The weight product: every implementation against float64 NumPy, and the interface to XLA against its header."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
import pytest

from pallas_kernels.weight_product import (
    IMPLEMENTATIONS,
    MOST_ROWS,
    handler,
    kernel_off,
    llvm,
    weight_product,
    weight_products,
)
from pallas_kernels.weight_product.assembly import Shape, Tile, module
from tide_jax.model.ops import times_rows

SHAPES = [(576, 1536), (577, 31), (5, 3), (33, 1000), (1, 1), (4864, 9)]
"""Depth and outputs: whole vectors, what is left over, several pieces for several threads, none."""


def weights_of(kind: str, depth: int, outputs: int) -> tuple[jax.Array, jax.Array | None]:
    rng = np.random.default_rng(depth)
    if kind == "float32":
        return jnp.asarray(rng.normal(size=(outputs, depth)), jnp.float32), None
    scale = jnp.asarray(rng.uniform(0.1, 1.0, outputs), jnp.float32)
    return jnp.asarray(rng.integers(-127, 128, (outputs, depth)), jnp.int8), scale


def rows_of(count: int, depth: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(1).normal(size=(MOST_ROWS, depth))[:count], jnp.float32)


@pytest.mark.matrix(keep=6)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS.names)
@pytest.mark.parametrize("kind", ["float32", "int8"])
@pytest.mark.parametrize("depth, outputs", SHAPES)
def test_it_is_the_formula(implementation: str, kind: str, depth: int, outputs: int) -> None:
    weights, scale = weights_of(kind, depth, outputs)
    for count in (1, 3, 8, MOST_ROWS):
        x = rows_of(count, depth)
        found = jax.jit(weight_product, static_argnames="implementation")(
            x, weights, scale, implementation=implementation
        )
        expected = np.asarray(x, np.float64) @ np.asarray(weights, np.float64).T
        expected *= 1 if scale is None else np.asarray(scale, np.float64)
        np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.matrix
@pytest.mark.parametrize("kind", ["float32", "int8"])
@pytest.mark.parametrize("depth, outputs", SHAPES)
def test_a_row_has_the_same_bits_whatever_stands_beside_it(kind: str, depth: int, outputs: int) -> None:
    weights, scale = weights_of(kind, depth, outputs)
    product = jax.jit(lambda x: weight_product(x, weights, scale, implementation="llvm"))
    alone = np.asarray(product(rows_of(1, depth)))[0]
    for count in range(2, MOST_ROWS + 1):
        np.testing.assert_array_equal(np.asarray(product(rows_of(count, depth)))[0], alone)


def test_several_products_in_one_call_are_those_of_calls_of_their_own() -> None:
    """Large and small, floats and integers: pieces of all of them are shared out among the threads."""
    products = [
        weights_of(*args) for args in (("float32", 96, 31), ("int8", 96, 9000), ("int8", 96, 1), ("float32", 96, 700))
    ]
    for count in (1, 5, MOST_ROWS):
        x = rows_of(count, 96)
        together = jax.jit(weight_products, static_argnames="implementation")(x, products, implementation="llvm")
        for found, (weights, scale) in zip(together, products, strict=True):
            np.testing.assert_array_equal(found, weight_product(x, weights, scale, implementation="llvm"))


def test_in_a_loop_over_a_switch() -> None:
    """As in a decode step; many products in a row, so that threads which come late find their work done."""
    weights = [weights_of("float32", 96, 96 * k)[0][:96] / 96 for k in (1, 2, 3)]

    def run(x: jax.Array, implementation: str) -> jax.Array:
        def body(carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            step, x = carry
            branches = [lambda x, w=w: weight_product(x, w, implementation=implementation) for w in weights]
            return step + 1, x + 0.1 * jax.lax.switch(step % 3, branches, x)

        return jax.lax.while_loop(lambda carry: carry[0] < 300, body, (jnp.int32(0), x))[1]

    x = rows_of(4, 96)
    expected, found = (jax.jit(run, static_argnums=1)(x, name) for name in ("reference", "llvm"))
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_it_has_a_derivative_and_maps() -> None:
    weights, x = weights_of("float32", 33, 7)[0], rows_of(5, 33)
    product = lambda x: weight_product(x, weights, implementation="llvm")  # noqa: E731
    np.testing.assert_allclose(jax.grad(lambda x: jnp.sum(product(x)))(x)[0], jnp.sum(weights, axis=0), rtol=1e-5)
    np.testing.assert_array_equal(jax.vmap(lambda row: product(row[None])[0])(x), product(x))


@pytest.mark.parametrize("transformation", [jax.jit, jax.vmap, jax.grad, lambda f: jax.jit(jax.vmap(jax.grad(f)))])
def test_the_first_use_of_a_process_may_be_inside_a_transformation(transformation: Callable) -> None:
    """The kernel runs once before it is used: that must not be traced into the caller's program."""
    weights = weights_of("float32", 33, 7)[0]
    total = lambda x: jnp.sum(weight_product(x.reshape(1, 33), weights, implementation="llvm"))  # noqa: E731
    x = rows_of(2, 33)
    x = {jax.jit: x[0], jax.grad: x[0]}.get(transformation, x)
    llvm.refusal.cache_clear()
    assert np.isfinite(transformation(total)(x)).all()
    assert llvm.refusal.cache_info().currsize == 1
    assert llvm.refusal() is None


def test_what_it_does_not_take() -> None:
    weights, scale = weights_of("int8", 8, 4)
    with pytest.raises(ValueError, match="int8 weights need a scale"):
        weight_product(rows_of(1, 8), weights)
    with pytest.raises(ValueError, match=r"takes 1 to 32 rows .* got \(33, 8\)"):
        weight_product(jnp.zeros((MOST_ROWS + 1, 8)), weights, scale, implementation="llvm")
    with pytest.raises(ValueError, match="multiplies float32 by float32 or int8, got bfloat16"):
        weight_product(rows_of(1, 8).astype(jnp.bfloat16), weights, scale, implementation="llvm")
    with pytest.raises(ValueError, match="is not known"):
        weight_product(rows_of(1, 8), weights, scale, implementation="numba")


@pytest.mark.parametrize("lanes", [4, 8, 16])
def test_programs_for_other_cpus_are_well_formed(lanes: int) -> None:
    import llvmlite.binding as llvm

    llvm.parse_assembly(module(Shape(lanes, (Tile(4, 2), Tile(2, 3), Tile(1, 1)), ""))).verify()


def test_offsets_are_those_of_xlas_header(tmp_path: Path) -> None:
    compiler = shutil.which("cc") or shutil.which("gcc")
    assert compiler, "the test needs a C compiler"
    fields = {
        "XLA_FFI_CallFrame": {"extension_start": "extension", "api": "api", "ctx": "context"},
        "XLA_FFI_Buffer": {"dtype": "dtype", "data": "data", "dims": "dims"},
        "XLA_FFI_Api": {
            "XLA_FFI_Error_Destroy": "destroy_error",
            "XLA_FFI_ThreadPool_Schedule": "schedule",
            "XLA_FFI_ThreadPool_NumThreads": "threads",
        },
    }
    tables = {"XLA_FFI_CallFrame": handler.FRAME, "XLA_FFI_Buffer": handler.BUFFER, "XLA_FFI_Api": handler.API}
    expected = {(kind, field): tables[kind][name] for kind, names in fields.items() for field, name in names.items()}
    expected[("XLA_FFI_CallFrame", "args.args")] = handler.FRAME["arguments"]
    expected[("XLA_FFI_CallFrame", "rets.rets")] = handler.FRAME["results"]
    expected[("XLA_FFI_CallFrame", "rets.size")] = handler.FRAME["results_count"]
    prints = "".join(f'printf("%zu\\n", offsetof({kind}, {field}));' for kind, field in expected)
    source = tmp_path / "offsets.c"
    source.write_text(
        '#include <stdio.h>\n#include <stdbool.h>\n#include <stddef.h>\n#include "xla/ffi/api/c_api.h"\n'
        f'int main(void) {{ {prints} printf("%d\\n", (int)XLA_FFI_DataType_S8); return 0; }}\n'
    )
    include = Path(jaxlib.__file__).parent / "include"
    subprocess.run([compiler, "-I", include, source, "-o", tmp_path / "offsets"], check=True)
    printed = subprocess.run([tmp_path / "offsets"], check=True, capture_output=True, text=True).stdout.split()
    assert list(map(int, printed)) == [*expected.values(), handler.S8]


def test_it_is_what_a_few_rows_take_unless_it_is_kernel_off() -> None:
    weights, _ = weights_of("float32", 64, 8)
    program = jax.jit(lambda x: times_rows(x, weights))

    def kernels(count: int) -> int:
        return program.lower(rows_of(count, 64)).as_text().count("tide_jax_weight_product")

    assert kernels(MOST_ROWS) == 1
    with kernel_off():
        assert kernels(MOST_ROWS) == 0
        few = program(rows_of(3, 64))
    np.testing.assert_allclose(program(rows_of(3, 64)), few, rtol=1e-5, atol=1e-5)
    assert "tide_jax_weight_product" not in program.lower(jnp.ones((MOST_ROWS + 1, 64))).as_text()


def test_a_program_for_another_platform_has_the_reference_in_it() -> None:
    weights, scale = weights_of("int8", 64, 8)
    program = jax.jit(lambda x: times_rows(x, weights, scale))
    text = program.trace(rows_of(2, 64)).lower(lowering_platforms=("cuda",)).as_text()
    assert "tide_jax_weight_product" not in text
    assert "dot_general" in text
