"""The kernels in Triton's own language, run by Triton's interpreter."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_triton_kernels_are_the_reference() -> None:
    for needed in ("triton", "torch"):
        if importlib.util.find_spec(needed) is None:
            pytest.skip(f"{needed} is not installed, and Triton's interpreter needs it")
    program = Path(__file__).parents[1] / "support" / "triton_interpreted.py"
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    found = subprocess.run([sys.executable, program], capture_output=True, text=True, env=environment, check=False)
    assert found.returncode == 0, found.stderr
    assert len(found.stdout.splitlines()) == 60
