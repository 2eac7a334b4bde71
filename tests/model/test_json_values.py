"""Settings of the wrong type: every value of a small JSON file, replaced by values of other types."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_lora import Q, linear, pair, save_adapter
from test_quantised import CASES, save

from convert.sources.lora import LoRASource
from convert.sources.open import open_source
from tide_jax.errors import TideError

WRONG: tuple[Any, ...] = ({}, {"a": {"b": 1}}, [[]], ["a"] * 500, "x" * 100_000, 2**70, -7, 0, 0.5, True)
QUANTISED = ("gptq, activation order", "awq", "bitsandbytes, nf4 twice", "fp8, blocks cut off", "compressed, packed")


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container inside a value, with each of its keys."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(items):
        yield value, key
        yield from places(inner)


def refusals(file: Path, part: str | None, opens: Any) -> int:
    """How many of the files are refused; the others open. Every refusal is one line of at most 300 characters."""
    values, refused = json.loads(file.read_text()), 0
    for container, key in places(values[part] if part else values):
        for wrong in WRONG:
            kept, container[key] = container[key], wrong
            file.write_text(json.dumps(values))
            container[key] = kept
            try:
                opens()
            except TideError as error:
                refused += 1
                message = str(error).replace(str(file.parent), "DIR")
                assert len(message) <= 300, (key, message)
                assert "\n" not in message
    return refused


@pytest.mark.parametrize("case", QUANTISED)
def test_quantisation_settings(case: str, tmp_path: Path) -> None:
    quantise, settings, _ = next(CASES[name] for name in CASES if name.startswith(case))
    save(tmp_path / "source", quantise, settings)
    file = tmp_path / "source" / "config.json"
    assert refusals(file, "quantization_config", lambda: open_source(tmp_path / "source")) >= 5


def test_adapter_settings(tmp_path: Path) -> None:
    a, b = pair(8, 8)
    save_adapter(tmp_path / "lora", {name: np.asarray(value) for name, value in linear(Q, a, b).items()})

    class Base:
        description, config, generation_config, files, tensors = "base", {"model_type": "llama"}, {}, (), {}

    file = tmp_path / "lora" / "adapter_config.json"
    assert refusals(file, None, lambda: LoRASource(Base(), tmp_path / "lora")) >= 5  # pyright: ignore[reportArgumentType]


def test_a_message_that_a_file_made_long_keeps_both_ends() -> None:
    message = str(TideError(f"bad value {'y' * 1000}\n{'z' * 10**6}: correct it"))
    assert message.startswith("bad value yyy")
    assert message.endswith("zzz: correct it")
    assert len(message) <= 300
    assert "\n" not in message
    assert str(TideError("short: correct it")) == "short: correct it"
