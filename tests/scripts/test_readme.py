"""The README's numbers come out of the committed results, and its commands are ones that there are."""

from __future__ import annotations

import argparse
import importlib
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import tide_jax.cli.main

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_tables_are_what_the_results_say() -> None:
    check = subprocess.run(
        [sys.executable, "-m", "scripts.readme.tables", "--check"],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert check.returncode == 0, check.stderr


def commands(page: Path) -> Iterator[list[str]]:
    """Arguments of each ``tide-jax`` in a page's shell blocks."""
    for block in re.findall(r"```sh\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            if line.startswith("tide-jax "):
                yield shlex.split(line, comments=True)[1:]


def test_commands_in_the_documentation_are_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    parsers = list[argparse.ArgumentParser]()
    monkeypatch.setattr("tide_jax.cli.command_line.execute", lambda make, _: parsers.append(make()) or 0)
    tide_jax.cli.main.main([])
    found = [arguments for page in PAGES for arguments in commands(page)]
    assert len(found) > 8
    for arguments in found:
        assert callable(parsers[0].parse_args(arguments).run), arguments


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
        assert (page.parent / link).exists(), link


@pytest.mark.parametrize("path", sorted((ROOT / "scripts").rglob("*.py")), ids=lambda path: path.stem)
def test_every_script_finds_what_it_imports(path: Path) -> None:
    try:
        importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
    except ModuleNotFoundError as error:  # a package that only this script needs
        if (error.name or "").split(".")[0] in ("", "scripts", "tide_jax", "convert", "pallas_kernels"):
            raise
