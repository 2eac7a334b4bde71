"""The product on a CPU: LLVM (llvmlite) compiles it for the current machine, and XLA calls it."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels.weight_product import reference
from pallas_kernels.weight_product.assembly import Shape, Tile, module
from pallas_kernels.weight_product.reference import Product

logger = logging.getLogger(__name__)
_TARGET = "tide_jax_weight_product"
_PAUSE = {"x86_64": "call void @llvm.x86.sse2.pause()", "aarch64": "call void @llvm.aarch64.hint(i32 1)"}


@jax.custom_jvp
def weight_products(x: Float[Array, "R K"], products: Sequence[Product]) -> tuple[Float[Array, "R N"], ...]:
    """See `pallas_kernels.weight_product.weight_products`; programs for other platforms contain the reference."""
    none = jnp.zeros((1,), jnp.float32)
    operands = [(weights, none if scale is None else scale) for weights, scale in products]

    def kernel(x: Array, operands: list[tuple[Array, Array]]) -> tuple[Array, ...]:
        out = [jax.ShapeDtypeStruct((x.shape[0], weights.shape[0]), jnp.float32) for weights, _ in operands]
        call = jax.ffi.ffi_call(_TARGET, out, vmap_method="sequential")
        return tuple(call(x, *(array for pair in operands for array in pair)))

    def plain(x: Array, operands: list[tuple[Array, Array]]) -> tuple[Array, ...]:
        scales = [scale for _, scale in products]
        return tuple(
            reference.weight_product(x, weights, None if scale is None else factors)
            for (weights, factors), scale in zip(operands, scales, strict=True)
        )

    return lax.platform_dependent(x, operands, cpu=kernel, default=plain)


@weight_products.defjvp
def _derivative(
    primals: tuple[Array, Sequence[Product]], tangents: tuple[Array, Any]
) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
    """Derivative with respect to x only: weights are frozen wherever this is differentiated."""
    x, products = primals
    return weight_products(x, products), tuple(reference.weight_product(tangents[0], *product) for product in products)


@functools.cache
def refusal() -> str | None:
    """Reason why the kernel can't run in this process, found by running it once; None if it can."""
    try:
        _register(_compiled().address)
        with ThreadPoolExecutor(max_workers=1) as elsewhere:  # a new thread, because the caller may be tracing
            right = elsewhere.submit(_is_right).result()
    except Exception as error:  # whatever LLVM, the interface or XLA raise: XLA's own product is always available
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return None if right else "its results are wrong on this machine"


def _is_right() -> bool:
    x, weights = np.arange(6, dtype=np.float32).reshape(2, 3), np.arange(12, dtype=np.int8).reshape(4, 3)
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        (found,) = weight_products(jnp.asarray(x), ((jnp.asarray(weights), jnp.full((4,), 0.5, jnp.float32)),))
    return np.array_equal(found, 0.5 * x @ weights.T.astype(np.float32))


class _Compiled:
    """Machine code, kept alive together with the objects that own it."""

    def __init__(self, engine: Any, owners: tuple[Any, ...]) -> None:
        self.address = engine.get_function_address("weight_product")
        self._owners = (engine, *owners)


@functools.cache
def _compiled() -> _Compiled:
    import llvmlite.binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    triple, cpu, features = llvm.get_process_triple(), llvm.get_host_cpu_name(), llvm.get_host_cpu_features()
    text = module(_shape(features, triple.split("-")[0]))
    machine = llvm.Target.from_triple(triple).create_target_machine(cpu=cpu, features=features.flatten(), opt=3)
    parsed = llvm.parse_assembly(text)
    engine = llvm.create_mcjit_compiler(parsed, machine)
    if (kept := _cache_file(f"{llvm.llvm_version_info} {cpu} {features.flatten()} {text}")) is not None:
        engine.set_object_cache(*_on_disk(kept))
    # Optimise only if no object file is cached.
    if kept is None or not kept.is_file():
        parsed.verify()
        passes = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(speed_level=3))
        passes.getModulePassManager().run(parsed, passes)
    engine.finalize_object()
    return _Compiled(engine, (machine, parsed))


def _shape(features: dict[str, bool], architecture: str) -> Shape:
    """Tile sizes for the vector registers: 32 of 512 bits, 16 of 256, or 16 to 32 of 128."""
    pause = _PAUSE.get(architecture, "")
    if features.get("avx512f"):
        return Shape(16, (Tile(8, 3), Tile(4, 4), Tile(2, 1), Tile(1, 1)), pause)
    return Shape(8 if features.get("avx2") else 4, (Tile(4, 2), Tile(2, 2), Tile(1, 1)), pause)


def _cache_file(key: str) -> Path | None:
    """File for the machine code, next to XLA's compilation cache; None if the user has no such cache."""
    directory = jax.config.jax_compilation_cache_dir
    if directory is None:
        return None
    return Path(directory) / f"weight_product-{hashlib.sha256(key.encode()).hexdigest()[:32]}.o"


def _on_disk(path: Path) -> tuple[Any, Any]:
    """Hooks with which LLVM stores and fetches an object file; a failed write is only logged."""

    def store(_: Any, code: bytes) -> None:
        partial = path.with_suffix(f".{id(code):x}.partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_bytes(code)
            partial.replace(path)
        except OSError as error:
            logger.info("%s cannot be written (%s): the weight product is compiled at every start", path, error)

    def fetch(_: Any) -> bytes | None:
        return path.read_bytes() if path.is_file() else None

    return store, fetch


def _register(address: int) -> None:
    capsule = ctypes.pythonapi.PyCapsule_New
    capsule.restype, capsule.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    jax.ffi.register_ffi_target(_TARGET, capsule(address, None, None), platform="cpu", api_version=1)
