"""The house rules: who imports whom, what a library must not do, and examples that run."""

from __future__ import annotations

import ast
import doctest
import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {"convert": {"tide_jax", "pallas_kernels"}, "tide_jax": {"pallas_kernels"}, "pallas_kernels": set()}
"""Each package, and those of ours it may import."""

MODULES = [path.relative_to(ROOT) for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
COMMAND_LINE = {
    Path("tide_jax/cli/main.py"),
    Path("tide_jax/cli/command_line.py"),
    Path("convert/__main__.py"),
    Path("tide_jax/cli/standard_streams.py"),
}


def nodes(path: Path) -> Iterator[ast.AST]:
    return ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8")))


def imported(path: Path) -> set[str]:
    """Top-level packages a file imports, anywhere in it."""
    found: set[str] = set()
    for node in nodes(path):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} imports relatively; the rule below can't follow it"
            found.add((node.module or "").partition(".")[0])
    return found


def test_there_is_something_to_check() -> None:
    assert {path.parts[0] for path in MODULES} == set(PACKAGES)
    assert len(MODULES) > 30


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_imports_go_one_way(path: Path) -> None:
    package = path.parts[0]
    assert imported(path) & set(PACKAGES) <= {package} | PACKAGES[package]


@pytest.mark.parametrize("path", [path for path in MODULES if path not in COMMAND_LINE], ids=str)
def test_a_library_does_not_print(path: Path) -> None:
    calls = [n for n in nodes(path) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)]
    assert not [call.lineno for call in calls if call.func.id == "print"]


@pytest.mark.parametrize("path", [path for path in MODULES if path.parts[0] != "convert"], ids=str)
def test_the_model_never_asks_which_family_it_is(path: Path) -> None:
    """`model_type` may be passed on and written down, but nothing is decided by it."""

    def reads(node: ast.AST) -> bool:
        return any(getattr(n, "attr", getattr(n, "id", None)) == "model_type" for n in ast.walk(node))

    for node in nodes(path):
        decided = [node] if isinstance(node, ast.Compare) else []
        decided += [node.subject] if isinstance(node, ast.Match) else []
        decided += [node.slice] if isinstance(node, ast.Subscript) else []
        decided += [node.test] if isinstance(node, (ast.If, ast.IfExp, ast.While)) else []
        assert not any(reads(part) for part in decided), f"{path}:{getattr(node, 'lineno', '')}"


_IMPORT_EVERYTHING = """
import os
environment = dict(os.environ)
import jax
settings = dict(jax.config.values)
import tide_jax, tide_jax.testing, tide_jax.texts
import pallas_kernels.exit_project.pallas_triton, pallas_kernels.exit_step.pallas_triton
changed = {k for k in settings | jax.config.values if settings.get(k) != jax.config.values.get(k)}
assert not changed, f"jax.config: {changed}"
assert dict(os.environ) == environment, "os.environ"
import sys
assert "convert" not in sys.modules and "torch" not in sys.modules
print("clean")
"""


def test_importing_changes_no_global_state() -> None:
    result = subprocess.run(
        [sys.executable, "-c", _IMPORT_EVERYTHING],
        capture_output=True,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        timeout=120,
        check=False,
    )
    assert result.stdout == "clean\n", result.stderr[-2000:]


@pytest.mark.parametrize("path", [p for p in MODULES if ">>>" in (ROOT / p).read_text(encoding="utf-8")], ids=str)
def test_examples_in_docstrings_run(path: Path) -> None:
    name = ".".join(path.with_suffix("").parts).removesuffix(".__init__")
    result = doctest.testmod(importlib.import_module(name))
    assert result.failed == 0
