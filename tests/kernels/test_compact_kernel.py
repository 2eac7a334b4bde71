"""Compaction: the reference against NumPy, its Pallas kernels against the reference, and lowering for CUDA."""

from __future__ import annotations

import functools
from typing import Any

import gpu_lowering
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels import selection
from pallas_kernels.compact import Partition, api, gather_rows, pallas_triton, partition, reference, scatter_rows

DTYPES = [jnp.float32, jnp.bfloat16, jnp.float16]
F32, BF16, F16 = DTYPES
CASES = [(1, 1, 1, F32), (2, 5, 8, F16), (3, 17, 63, BF16), (1, 300, 130, F32), (2, 9, 4100, BF16)]
KERNEL = "pallas_interpret"


def active_of(batch: int, rows: int, share: float = 0.6) -> jax.Array:
    return jnp.asarray(np.random.default_rng(rows).random((batch, rows)) < share)


def states_of(batch: int, rows: int, columns: int, dtype: Any) -> jax.Array:
    return jnp.asarray(np.random.default_rng(columns).normal(size=(batch, rows, columns)), dtype)


def by_hand(active: np.ndarray) -> list[list[int]]:
    """The active rows of each batch entry."""
    return [[n for n, there in enumerate(row) if there] for row in active]


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("batch, rows", [(1, 1), (3, 2), (2, 17), (1, 1000), (1, 65536)])
def test_active_rows_come_first_in_their_order(batch: int, rows: int, share: float) -> None:
    active = active_of(batch, rows, share)
    found = jax.jit(partition)(active)
    expected = np.argsort(~np.asarray(active), axis=1, kind="stable")
    np.testing.assert_array_equal(found.order, expected)
    np.testing.assert_array_equal(np.take_along_axis(np.asarray(found.place), expected, 1)[0], np.arange(rows))
    np.testing.assert_array_equal(found.kept, np.asarray(active).sum(axis=1))
    assert all(a.dtype == jnp.int32 for a in found)


@pytest.mark.parametrize("implementation", ["reference", KERNEL])
@pytest.mark.parametrize("share", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("batch, rows, columns, dtype", CASES)
def test_rows_are_gathered(batch: int, rows: int, columns: int, dtype: Any, share: float, implementation: str) -> None:
    """Rows that are not active hold NaN: none of it comes along."""
    active = active_of(batch, rows, share)
    x = jnp.where(active[:, :, None], states_of(batch, rows, columns, dtype), jnp.nan)
    for size in {(rows + 1) // 2, rows}:
        found = gather_rows(x, partition(active), size, implementation=implementation)
        assert (found.shape, found.dtype) == ((batch, size, columns), dtype)
        expected = np.zeros((batch, size, columns), np.float32)
        for b, numbers in enumerate(by_hand(np.asarray(active))):
            expected[b, : len(numbers)] = np.asarray(x[b], np.float32)[numbers[:size]]
        np.testing.assert_array_equal(np.asarray(found, np.float32), expected)


@pytest.mark.parametrize("implementation", ["reference", KERNEL])
@pytest.mark.parametrize("share", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("batch, rows, columns, dtype", CASES)
def test_rows_are_scattered_and_others_stay(
    batch: int, rows: int, columns: int, dtype: Any, share: float, implementation: str
) -> None:
    active = active_of(batch, rows, share)
    found_at = partition(active)
    out = jnp.where(active[:, :, None], jnp.nan, states_of(batch, rows, columns, jnp.float32))
    for size in {(rows + 1) // 2, rows}:
        there = np.arange(size)[None] < np.asarray(found_at.kept)[:, None]
        compacted = jnp.where(there[:, :, None], states_of(batch, size, columns, dtype), jnp.nan)
        found = scatter_rows(compacted, found_at, out, implementation=implementation)
        assert found.dtype == out.dtype
        expected = np.array(out)
        for b, numbers in enumerate(by_hand(np.asarray(active))):
            expected[b, numbers[:size]] = np.asarray(compacted[b], np.float32)[: len(numbers)]
        np.testing.assert_array_equal(found, expected)


def test_what_was_gathered_goes_back() -> None:
    active, x = active_of(2, 40), states_of(2, 40, 70, jnp.bfloat16)
    rows = partition(active)
    for name in ("reference", KERNEL):
        doubled = 2 * gather_rows(x, rows, 31, implementation=name)
        found = scatter_rows(doubled, rows, x, implementation=name)
        np.testing.assert_array_equal(found, jnp.where(active[:, :, None], 2 * x, x))


def test_what_cannot_be_done_is_refused_with_the_reason() -> None:
    x, rows = states_of(1, 4, 8, jnp.float32), partition(active_of(1, 4))
    for name in ("pallas_triton", "triton"):
        with pytest.raises(ValueError, match=f"'{name}' runs on a GPU, this process computes on a cpu"):
            gather_rows(x, rows, 2, implementation=name)
    for size in (0, 5):
        with pytest.raises(ValueError, match=f"{size} rows can't be taken out of 4"):
            gather_rows(x, rows, size)
    with pytest.raises(ValueError, match="5 rows can't be taken out of 4"):
        scatter_rows(states_of(1, 5, 8, jnp.float32), rows, x)
    with pytest.raises(ValueError, match="float32, float16 and bfloat16 rows, not int32"):
        gather_rows(x.astype(jnp.int32), rows, 2, implementation=KERNEL)
    with pytest.raises(ValueError, match="float32, float16 and bfloat16 rows, not int32"):
        scatter_rows(x.astype(jnp.int32), rows, x, implementation=KERNEL)

    def gathered(x: Any) -> jax.Array:
        rows = Partition(jnp.zeros(x.shape[:2], jnp.int32), jnp.zeros(x.shape[:2], jnp.int32), jnp.zeros((1,), int))
        return gather_rows(x, rows, 2, implementation=KERNEL)

    with pytest.raises(ValueError, match="up to 65536 rows"):
        jax.eval_shape(gathered, jax.ShapeDtypeStruct((1, 65537, 1), jnp.float32))
    with pytest.raises(ValueError, match=r"2\^31 numbers"):
        jax.eval_shape(gathered, jax.ShapeDtypeStruct((1, 65536, 32768), jnp.bfloat16))


def test_none_is_the_reference_and_once_proven_the_kernel_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    x, rows = states_of(1, 4, 8, jnp.float32), partition(active_of(1, 4))

    def kernels() -> list[bool]:
        calls = (lambda x: gather_rows(x, rows, 2)), (lambda x: scatter_rows(x[:, :2], rows, x))
        return [bool(gpu_lowering.kernel_equations(call, x)) for call in calls]

    monkeypatch.setattr(selection, "platform", lambda: "gpu")
    assert kernels() == [False, False]
    monkeypatch.setattr(api, "IMPLEMENTATIONS", api.IMPLEMENTATIONS._replace(proven=True))
    assert kernels() == [True, True]


# What a GPU's compiler would be given.


def abstract(batch: int, rows: int, columns: int, dtype: Any) -> tuple[Any, Partition]:
    def of(shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    return jax.ShapeDtypeStruct((batch, rows, columns), dtype), Partition(*(of((batch, rows)),) * 2, of((batch,)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [1, 63, 576, 8192])
def test_kernels_lower_for_cuda(columns: int, dtype: Any) -> None:
    for batch, rows, size in ((3, 37, 10), (1, 65536, 16384)):
        x, found_at = abstract(batch, rows, columns, dtype)
        gather = functools.partial(pallas_triton.gather_rows, size=size)
        compacted, _ = abstract(batch, size, columns, dtype)
        for kernel, arguments in (
            (gather, (x, found_at)),
            (pallas_triton.scatter_rows, (compacted, found_at, x)),
        ):
            assert gpu_lowering.lower(kernel, *arguments).count(gpu_lowering.KERNEL_CALL) == 1
            assert not gpu_lowering.undefined_loads(gpu_lowering.kernel_equations(kernel, *arguments))


def test_lowering_refuses_what_the_gpu_cannot_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """Interpreted, both run: only lowering tells. Sorting is what a partition would be at its simplest."""
    x, rows = states_of(1, 6, 96, jnp.float32), partition(active_of(1, 6))
    monkeypatch.setattr(pallas_triton, "block", lambda columns: 48)
    np.testing.assert_array_equal(
        pallas_triton.gather_rows(x, rows, 4, interpret=True), reference.gather_rows(x, rows, 4)
    )
    with pytest.raises(ValueError, match="power of 2"):
        gpu_lowering.lower(functools.partial(pallas_triton.gather_rows, size=4), *abstract(1, 6, 96, jnp.float32))

    def order(active: jax.Array, interpret: bool) -> jax.Array:
        def kernel(active_ref: Any, out_ref: Any) -> None:
            out_ref[...] = jnp.argsort(~active_ref[...], stable=True).astype(jnp.int32)

        return pl.pallas_call(
            kernel,
            out_shape=jax.ShapeDtypeStruct(active.shape, jnp.int32),
            compiler_params=plt.CompilerParams(num_warps=4, num_stages=1),
            interpret=interpret,
        )(active)

    active = active_of(1, 8)
    np.testing.assert_array_equal(order(active[0], True), partition(active).order[0])
    with pytest.raises(NotImplementedError, match="sort"):
        gpu_lowering.lower(functools.partial(order, interpret=False), jax.ShapeDtypeStruct((8,), jnp.bool_))
