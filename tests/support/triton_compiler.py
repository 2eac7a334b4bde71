"""What Triton's compiler makes of kernels for a GPU that is not there. Only calling this needs triton."""

from __future__ import annotations

import re
import subprocess
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import gpu_lowering
import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import jax_triton_call

ARCHITECTURES = {80: "sm_80", 90: "sm_90a"}
_TYPES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "int32": "i32", "bool": "i1"}


class Compiled(NamedTuple):
    """A kernel's instructions.

    Attributes:
      instructions: how often each PTX instruction stands there.
      spilled: bytes that registers are spilled into.
      undefined_loads: masked loads that don't say what the masked elements are.
      wide_addresses: whether positions in arrays are counted in 64 bits.
    """

    instructions: Counter[str]
    spilled: int
    undefined_loads: int
    wide_addresses: bool

    def count(self, pattern: str) -> int:
        """Instructions whose names start like that."""
        return sum(n for name, n in self.instructions.items() if re.match(pattern, name))


def compiled(folder: Path, architecture: int, function: Any, *arguments: Any) -> dict[str, Compiled]:
    """The Pallas kernels that a function calls, by name."""
    found = {}
    for kernel in gpu_lowering.kernel_texts(function, *arguments):
        source = folder / f"{kernel.name}.ttir"
        source.write_text(kernel.text)
        found[kernel.name] = _compiled(folder / f"{kernel.name}.ptx", str(source), architecture, kernel.options)
    return found


class _Call(NamedTuple):
    kernel: Any
    pointers: tuple[jax.ShapeDtypeStruct, ...]
    warps: int
    constants: Mapping[str, Any]


def compiled_twins(folder: Path, architecture: int, function: Any, *arguments: Any) -> dict[str, Compiled]:
    """The kernels in Triton's own language that a function calls through jax_triton, by name."""
    from triton.compiler import ASTSource

    found = {}
    for call in _calls(function, *arguments):
        names = call.kernel.arg_names
        types = {n: f"*{_TYPES[a.dtype.name]}" for n, a in zip(names, call.pointers, strict=False)}
        aligned = {(i,): [["tt.divisibility", 16]] for i in range(len(types))}
        signature = types | dict.fromkeys(call.constants, "constexpr")
        source = ASTSource(call.kernel, signature, constexprs=dict(call.constants), attrs=aligned)
        name = call.kernel.__name__
        options = {"num_warps": call.warps, "num_stages": 2}
        found[name] = _compiled(folder / f"{name}.ptx", source, architecture, options)
    return found


def _calls(function: Any, *arguments: Any) -> list[_Call]:
    calls = list[_Call]()

    def run(
        kernel: Any,
        inputs: Sequence[jax.Array],
        outputs: Sequence[jax.ShapeDtypeStruct],
        *,
        grid: tuple[int, ...],
        warps: int,
        constants: Mapping[str, Any],
    ) -> list[jax.Array]:
        pointers = *(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in inputs), *outputs
        calls.append(_Call(kernel, pointers, warps, constants))
        return [jnp.zeros(o.shape, o.dtype) for o in outputs]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax_triton_call, "run", run)
        jax.eval_shape(function, *arguments)
    return calls


def _compiled(assembly: Path, source: Any, architecture: int, options: dict[str, int]) -> Compiled:
    import triton
    from triton.backends.compiler import GPUTarget

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    assembly.write_text(made.asm["ptx"])
    names = re.findall(r"^\s*(?:@%\w+ )?([a-z][\w.:]+)", made.asm["ptx"], re.MULTILINE)
    undefined = re.findall(r"tt\.load %\w+, %\w+ ", made.asm["ttir"])
    return Compiled(Counter(names), _spilled(assembly, architecture), len(undefined), "xi64>" in made.asm["ttir"])


def _spilled(assembly: Path, architecture: int) -> int:
    """What NVIDIA's assembler says; the wheel's second one knows newer PTX."""
    import triton

    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    target = [f"-arch={ARCHITECTURES[architecture]}", "-v", str(assembly), "-o", str(assembly.with_suffix(".cubin"))]
    outputs = []
    for program in sorted(folder.glob("ptxas*")):
        result = subprocess.run([program, *target], capture_output=True, text=True, check=False)
        if result.returncode == 0:
            return sum(int(n) for n in re.findall(r"(\d+) bytes spill", result.stderr))
        outputs.append(result.stderr)
    raise AssertionError("\n".join(outputs))
