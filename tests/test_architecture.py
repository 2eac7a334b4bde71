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

ROOMS = {
    "tide_jax": """errors | checks ranges temporaries json_files | records | tokenizer | model | config | exits |
    generation | lossless calibration drift | engine functional | risk texts testing | cli | lm_eval""",
    "convert": """quiet configuration | weights | families | sources | tied output verify_weights | verify | probe |
    architecture | conversion | exporting parity""",
}
"""The rooms of a package from the lowest up. One imports from itself and from those before the bar on its left."""

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


def ours(path: Path) -> set[str]:
    """Modules of the file's own package that it imports, anywhere in it, but for types."""
    package, found = path.parts[0], set()
    for_types = [node for node in nodes(path) if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    passed_over = {node.lineno for block in for_types for node in block.body}
    for node in nodes(path):
        if getattr(node, "lineno", None) in passed_over:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == package:
            deeper = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name for name in deeper if is_module(name)} or {node.module or ""}
    return {name for name in found if name.startswith(f"{package}.")}


def is_module(name: str) -> bool:
    place = ROOT / name.replace(".", "/")
    return place.with_suffix(".py").is_file() or (place / "__init__.py").is_file()


@pytest.mark.parametrize("path", [path for path in MODULES if path.parts[0] in ROOMS], ids=str)
def test_rooms_build_on_lower_ones(path: Path) -> None:
    package, room = path.parts[0], path.with_suffix("").parts[1]
    if room in ("__init__", "__main__"):  # the doors
        return
    levels = [level.split() for level in ROOMS[package].split("|")]
    assert room in {name for level in levels for name in level}, f"{room} has no place in ROOMS"
    (mine,) = [number for number, level in enumerate(levels) if room in level]
    lower = {name for level in levels[:mine] for name in level} | {room}
    assert {name.split(".")[1] for name in ours(path)} <= lower


@pytest.mark.parametrize("path", [path for path in MODULES if path.parts[0] == "pallas_kernels"], ids=str)
def test_no_operation_imports_another(path: Path) -> None:
    """Operations share only the files beside their folders, and those know no operation."""
    folders = {name.split(".")[1] for name in ours(path) if (ROOT / "pallas_kernels" / name.split(".")[1]).is_dir()}
    assert folders <= set(path.parts[1:-1])


def test_no_module_imports_itself_in_a_circle() -> None:
    """Not even inside a function: such a circle is two modules that are one."""
    imports = {".".join(path.with_suffix("").parts): ours(path) for path in MODULES if path.name != "__init__.py"}

    def reached(start: str) -> set[str]:
        found: set[str] = set()
        waiting = list(imports[start])
        while waiting:
            if (name := waiting.pop()) not in found and name in imports:
                found.add(name)
                waiting += imports[name]
        return found

    assert not [name for name in imports if name in reached(name)]


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
