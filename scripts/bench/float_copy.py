"""Writes a source's float32 weights as safetensors for transformers, the same format that tide_jax reads.

Reading weights from a GGUF file costs transformers extra memory and time that are no part of generation.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from convert.quiet import quiet_transformers
from convert.sources.open import open_source
from convert.verify import reference_model


@contextlib.contextmanager
def float_copy(source: str) -> Iterator[Path]:
    """Yields a temporary folder with the copy."""
    with tempfile.TemporaryDirectory() as folder:
        with quiet_transformers():
            model = reference_model(open_source(source))
        model.hf_quantizer = None  # its weights are plain float32 by now
        for mark in {"quantization_config"} & set(vars(model.config)):
            delattr(model.config, mark)
        model.save_pretrained(folder)
        del model
        gc.collect()
        yield Path(folder)


def load_reference(source: str | None) -> Any:
    """Loads transformers' float32 model from a copy; returns None without a source or without torch."""
    if source is None:
        return None
    if importlib.util.find_spec("torch") is None:
        print("torch is not installed: transformers is left out")
        return None
    from scripts.bench.peer_transformers import load_peer

    with float_copy(source) as folder:
        return load_peer(folder)
