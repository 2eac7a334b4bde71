"""Lowering of programs for an NVIDIA GPU that is not there."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
from jax._src.interpreters import mlir
from jax._src.lib.mlir import ir
from jax._src.lib.triton import dialect as triton_dialect
from jax.extend import core
from jax.sharding import AbstractMesh, AxisType

KERNEL_CALL = "__gpu$xla.gpu.triton"


def lower(function: Callable[..., Any], *arguments: Any) -> str:
    """StableHLO of a function for CUDA, kernels made; raises what the kernel language refuses."""
    return _lowered(function, *arguments).as_text()


def _lowered(function: Callable[..., Any], *arguments: Any) -> jax.stages.Lowered:
    with _pretended_gpu(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The Pallas Triton backend is deprecated", DeprecationWarning)
        return jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",))


def _pretended_gpu() -> contextlib.AbstractContextManager[Any]:
    """From 0.11 on JAX asks which GPU a kernel is made for; before, it assumes compute capability 9.0 by itself."""
    if not hasattr(jax.sharding, "AbstractDevice"):
        return contextlib.nullcontext()
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
    return jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), (AxisType.Explicit,), abstract_device=device))


def kernel_equations(function: Callable[..., Any], *arguments: Any) -> list[core.JaxprEqn]:
    """All operations inside the kernels that a function calls."""
    outer = jax.make_jaxpr(function)(*arguments).jaxpr
    kernels = [equation for equation in equations(outer) if equation.primitive.name == "pallas_call"]
    return [inner for kernel in kernels for inner in equations(kernel.params["jaxpr"])]


def equations(jaxpr: core.Jaxpr) -> Iterator[core.JaxprEqn]:
    """All operations of a program, inner ones included, in order."""
    for equation in jaxpr.eqns:
        yield equation
        for parameter in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda p: hasattr(p, "eqns")):
            inner = getattr(parameter, "jaxpr", parameter)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def undefined_loads(equations: list[core.JaxprEqn]) -> list[core.JaxprEqn]:
    """Masked loads that don't say what the masked elements are."""
    loads = [equation for equation in equations if equation.primitive.name == "masked_load"]
    return [load for load in loads if _masked_without_value(load)]


def _masked_without_value(load: core.JaxprEqn) -> bool:
    _, _, mask, other = jax.tree.unflatten(load.params["args_tree"], load.invars)
    return mask is not None and other is None


class KernelText(NamedTuple):
    """A kernel as Triton's compiler gets it."""

    name: str
    text: str
    options: dict[str, int]


def kernel_texts(function: Callable[..., Any], *arguments: Any) -> list[KernelText]:
    """The Triton IR of the kernels that a function calls. JAX has no public way to it."""
    found: list[KernelText] = []

    def visit(operation: Any) -> None:
        if operation.name == "stablehlo.custom_call" and KERNEL_CALL in str(operation.attributes["call_target_name"]):
            found.append(_kernel_text(ir.DictAttr(operation.attributes["mhlo.backend_config"])))
        for region in operation.regions:
            for block in region.blocks:
                for inner in block.operations:
                    visit(inner.operation)

    visit(_lowered(function, *arguments).compiler_ir("stablehlo").operation)
    return found


def _kernel_text(settings: Any) -> KernelText:
    context = mlir.JaxIrContext()
    context.append_dialect_registry(mlir.upstream_dialects)
    triton_dialect.register_dialect(context)
    context.load_all_available_dialects()
    with context:
        module = ir.Module.parse(ir.StringAttr(settings["ir"]).value_bytes)
        text = module.operation.get_asm(enable_debug_info=False)
    options = {key: ir.IntegerAttr(settings[key]).value for key in ("num_warps", "num_stages")}
    return KernelText(ir.StringAttr(settings["name"]).value, text, options)
