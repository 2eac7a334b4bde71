"""What scripts/gpu/compiled_program.py reads off a compiled program."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from scripts.gpu.compiled_program import (
    LargeResult,
    collectives,
    float_copies,
    large_results,
    largest_graph,
    launches,
    moves_only,
)
from tide_jax.model.ops import integer_sums, times_rows

HLO = """
%sliced (p.1: bf16[8,4,1024]) -> bf16[1,4,1024] {
  %p.1 = bf16[8,4,1024]{2,1,0} parameter(0)
  ROOT %s = bf16[1,4,1024]{2,1,0} slice(%p.1), slice={[0:1], [0:4], [0:1024]}
}

%updated (p.2: bf16[4,1024], p.3: bf16[1,1024], p.4: s32[]) -> bf16[4,1024] {
  %p.2 = bf16[4,1024]{1,0} parameter(0)
  %p.3 = bf16[1,1024]{1,0} parameter(1)
  %p.4 = s32[] parameter(2)
  ROOT %u = bf16[4,1024]{1,0} dynamic-update-slice(%p.2, %p.3, %p.4, %p.4)
}

%branch (arg: (bf16[8,4,1024], f32[])) -> (f32[16]) {
  %arg = (bf16[8,4,1024]{2,1,0}, f32[]) parameter(0)
  %cache = bf16[8,4,1024]{2,1,0} get-tuple-element(%arg), index=0
  %copied = bf16[1,4,1024]{2,1,0} fusion(%cache), kind=kLoop, calls=%sliced
  %two = (f32[16]{0}, /*index=1*/f32[64,128]{1,0}) custom-call(%copied), custom_call_target="kernel"
  %small = f32[16]{0} get-tuple-element(%two), index=0
  ROOT %out = (f32[16]{0}) tuple(%small)
}

ENTRY %main (x: bf16[4,1024], y: bf16[1,1024], i: s32[]) -> bf16[4,1024] {
  %x = bf16[4,1024]{1,0} parameter(0)
  %y = bf16[1,1024]{1,0} parameter(1)
  %i = s32[] parameter(2)
  %flags = pred[9000]{0} copy(%x)
  ROOT %fusion = bf16[4,1024]{1,0} fusion(%x, %y, %i), kind=kLoop, calls=%updated
}
"""


def test_what_a_program_writes() -> None:
    """Of fusions only their results, whatever computation they stand in; updates in place are none."""
    expected = [
        LargeResult("slice", "bf16[1,4,1024]", 8192),
        LargeResult("custom-call", "f32[64,128]", 32768),
        LargeResult("copy", "pred[9000]", 9000),
    ]
    assert large_results(HLO, 8192) == expected
    assert large_results(HLO, 8193) == expected[1:]
    assert not large_results(HLO, 1 << 20)


TPU = """
ENTRY %main (x: s8[32,128], y: bf16[32,128]) -> bf16[32,128] {
  %x = s8[32,128]{1,0:T(32,128)(4,1)} parameter(0)
  %y = bf16[32,128]{1,0:T(8,128)(2,1)} parameter(1)
  %begun = (bf16[32,128]{1,0:T(8,128)(2,1)S(1)}, bf16[32,128]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}) copy-start(%y)
  %read = bf16[32,128]{1,0:T(8,128)(2,1)S(1)} copy-done(%begun)
  %turned = s8[32,128]{1,0:T(8,128)(4,1)} copy(%x)
  %back = (bf16[32,128]{1,0:T(8,128)(2,1)}, bf16[32,128]{1,0:T(8,128)(2,1)S(1)}, u32[]{:S(2)}) copy-start(%read)
  %near = bf16[32,128]{1,0:T(8,128)(2,1)S(1)} convert(%turned)
  ROOT %written = bf16[32,128]{1,0:T(8,128)(2,1)} copy-done(%back)
}
"""


def test_what_a_tpu_reads_ahead_is_no_copy() -> None:
    """Memory on the chip is written in passing; what comes back from there, or is laid out anew, is a copy."""
    turned, written = LargeResult("copy", "s8[32,128]", 4096), LargeResult("copy-done", "bf16[32,128]", 8192)
    assert large_results(TPU, 4096) == [turned, written]
    assert large_results(TPU, 4097) == [written]


def test_floats_made_of_integers_are_found_in_any_memory() -> None:
    """Moves of floats, as of a cache, are none; nor are integers in another order, or floats of another number."""
    assert float_copies(TPU, {32 * 128}) == [LargeResult("convert", "bf16[32,128]", 8192)]
    assert not float_copies(TPU, {32 * 127})


@pytest.mark.parametrize(("tokens", "outputs"), [(1, 512), (40, 16384)])
def test_a_product_that_makes_floats_first_is_found(tokens: int, outputs: int) -> None:
    """XLA's CPU backend makes floats of all integers of one product; `times_rows` hands it some rows at a time.

    Of a prompt's tokens these are more rows, so there the matrix is a larger one.
    """
    weights = outputs * 2048
    x, integers = jax.ShapeDtypeStruct((tokens, 2048), jnp.float32), jax.ShapeDtypeStruct((outputs, 2048), jnp.int8)

    def at_once(x: jax.Array, integers: jax.Array) -> jax.Array:
        return integer_sums("td,fd->tf", x, integers)

    def by_rows(x: jax.Array, integers: jax.Array) -> jax.Array:
        return times_rows(x, integers, jnp.ones((outputs,)))

    first = jax.jit(at_once).lower(x, integers).compile().as_text()
    assert [result.shape for result in float_copies(first, {weights})] == [f"f32[{outputs},2048]"]
    assert [result.size for result in large_results(first, 4 * weights)] == [4 * weights]
    assert not float_copies(jax.jit(by_rows).lower(x, integers).compile().as_text(), {weights})


def test_what_a_program_launches() -> None:
    thunks = """000: kCommandBuffer [source]
    001: kCustomKernel [source | sink] loop_fusion grid: [64, 1, 1]
011: kWhile         [prev=000 (1)]
  body:
    000: kCommandBuffer [source | sink]
        013: kCustomKernel [source] kCopy
"""
    assert launches(thunks) == {"kCommandBuffer": 2, "kCustomKernel": 2, "kWhile": 1}


def test_exchanges_between_devices() -> None:
    program = """
ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  %s = f32[8]{0} all-reduce-start(%x), to_apply=%add
  %d = f32[8]{0} all-reduce-done(%s)
  %r = f32[8]{0} all-reduce(%d), to_apply=%add
  ROOT %g = f32[8]{0} all-gather(%r), dimensions={0}
}
"""
    assert collectives(program) == {"all-reduce": 2, "all-gather": 1}


def test_what_only_moves_numbers() -> None:
    assert moves_only(LargeResult("transpose+convert", "f32[8]", 32))
    assert not moves_only(LargeResult("transpose+dot", "f32[8]", 32))
    assert not moves_only(LargeResult("convert+multiply", "f32[8]", 32))
    assert moves_only(LargeResult("convert+multiply", "f32[8]", 32), scaled=True)
    assert not moves_only(LargeResult("multiply+reduce", "f32[8]", 32), scaled=True)


def test_the_largest_graph() -> None:
    thunks = """000: kCommandBuffer [source]
    001: kCustomKernel [source] a
    002: kCopy [source] kCopy
003: kWhile [prev=000]
  body:
    000: kCommandBuffer [source]
        004: kCustomKernel [source] b
        005: kKernel [source] c
    006: kCustomKernel [source] outside
"""
    assert largest_graph(thunks) == 2
    assert largest_graph("000: kCustomKernel [source] a") == 0
