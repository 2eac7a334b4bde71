"""What scripts/gpu_program.py reads off a compiled program."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))
from gpu_program import LargeResult, large_results, launches  # pyright: ignore[reportMissingImports]

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


def test_what_a_program_launches() -> None:
    thunks = """000: kCommandBuffer [source]
    001: kCustomKernel [source | sink] loop_fusion grid: [64, 1, 1]
011: kWhile         [prev=000 (1)]
  body:
    000: kCommandBuffer [source | sink]
        013: kCustomKernel [source] kCopy
"""
    assert launches(thunks) == {"kCommandBuffer": 2, "kCustomKernel": 2, "kWhile": 1}
