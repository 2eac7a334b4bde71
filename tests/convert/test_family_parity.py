"""Every model type that converts, and variants of it, against transformers on all paths (`convert.parity.measure`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from convert.families import FAMILIES, REFUSED
from convert.parity.measure import measure_parity
from convert.parity.tiny import save_tiny, text_type
from convert.parity.tiny_variants import REFUSED_VARIANTS, VARIANTS
from tide_jax.errors import TideError

pytest.importorskip("torch")


def supported(model_type: str) -> bool:
    return model_type in FAMILIES or (model_type not in REFUSED and text_type(model_type) in FAMILIES)


TYPES = [model_type for model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if supported(model_type)]
CASES: dict[str, tuple[str, dict[str, Any]]] = {name: (name, {}) for name in TYPES}
CASES |= {name: case for name, case in VARIANTS.items() if case[0] in TYPES}


@pytest.mark.matrix(keep=6)
@pytest.mark.parametrize("name", CASES)
def test_parity(name: str, tmp_path: Path) -> None:
    model_type, fields = CASES[name]
    save_tiny(model_type, tmp_path, **fields)
    assert measure_parity(tmp_path).problems == ()


@pytest.mark.parametrize("name", REFUSED_VARIANTS)
def test_variants_that_are_refused_by_name(name: str, tmp_path: Path) -> None:
    model_type, fields = REFUSED_VARIANTS[name]
    save_tiny(model_type, tmp_path, **fields)
    with pytest.raises(TideError, match=f"{model_type} with .* is not supported"):
        measure_parity(tmp_path)
