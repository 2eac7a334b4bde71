"""Heads that are tied to the embedding, as transformers reads them: whichever of the two tensors is stored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_text_model import save as save_multimodal
from tiny_llama import refusal

from convert import open_model
from convert.conversion import open_config
from convert.parity.reference import random_batch
from convert.parity.tiny import VOCAB, save_tiny
from convert.verify import TOLERANCE

torch = pytest.importorskip("torch")
safetensors = pytest.importorskip("safetensors.numpy")

_TOKENS = random_batch(VOCAB).tokens[:1]


def edit(directory: Path, changes: dict[str, Any], *, drop: str = "", **flags: Any) -> Path:
    """Adds and drops tensors of a checkpoint, and sets `flags` in its config.json; None removes one."""
    file, config = directory / "model.safetensors", directory / "config.json"
    tensors = {name: a for name, a in safetensors.load_file(file).items() if name != drop} | changes
    safetensors.save_file(tensors, file, metadata={"format": "pt"})
    settings = json.loads(config.read_text()) | flags
    config.write_text(json.dumps({name: value for name, value in settings.items() if value is not None}))
    return directory


def stored(directory: Path, ending: str) -> tuple[str, np.ndarray]:
    tensors = safetensors.load_file(directory / "model.safetensors")
    return next((name, a) for name, a in tensors.items() if name.endswith(ending))


def assert_as_transformers(directory: Path) -> None:
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = reference(input_ids=torch.tensor(_TOKENS)).logits.numpy()
    found = np.asarray(open_model(directory, "float32")(_TOKENS))
    assert np.abs(found - expected).max() <= TOLERANCE * np.ptp(expected)


@pytest.mark.parametrize(
    "model_type, embedding, head",
    [
        ("llama", "embed_tokens.weight", "lm_head.weight"),
        ("gpt2", "wte.weight", "lm_head.weight"),
        ("bert", "word_embeddings.weight", "cls.predictions.decoder.weight"),
    ],
)
def test_a_tied_head_that_is_stored_alone_is_the_embedding(
    model_type: str, embedding: str, head: str, tmp_path: Path
) -> None:
    save_tiny(model_type, tmp_path, tie_word_embeddings=True, num_hidden_layers=2)
    name, table = stored(tmp_path, embedding)
    assert_as_transformers(edit(tmp_path, {head: table}, drop=name))
    assert open_config(tmp_path).tie_embeddings


@pytest.mark.parametrize("own", [True, False])
def test_a_head_that_is_stored_beside_the_embedding(own: bool, tmp_path: Path) -> None:
    save_tiny("llama", tmp_path, tie_word_embeddings=True, num_hidden_layers=2)
    _, table = stored(tmp_path, "embed_tokens.weight")
    assert_as_transformers(edit(tmp_path, {"lm_head.weight": table[::-1].copy() if own else table.copy()}))
    assert open_config(tmp_path).tie_embeddings is not own


def test_a_head_that_is_neither_tied_nor_stored_is_refused(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "source", tie_word_embeddings=True, num_hidden_layers=2)
    assert "head.kernel" in refusal(edit(tmp_path / "source", {}, tie_word_embeddings=False))


@pytest.mark.parametrize("of_text", [True, False, None])
@pytest.mark.parametrize("of_whole", [True, False, None])
@pytest.mark.parametrize("head", ["own", "same", "absent"])
def test_flags_of_the_whole_and_of_the_text_part(
    of_whole: bool | None, of_text: bool | None, head: str, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    save_multimodal("llava", source)
    text = json.loads((source / "config.json").read_text())["text_config"] | {"tie_word_embeddings": of_text}
    text = {name: value for name, value in text.items() if value is not None}
    (_, table), (name, _) = stored(source, "embed_tokens.weight"), stored(source, "lm_head.weight")
    changes = {name: table.copy()} if head == "same" else {}
    drop = name if head == "absent" else ""
    edit(source, changes, drop=drop, tie_word_embeddings=of_whole, text_config=text)
    if head == "absent" and not of_whole and not of_text:
        assert "head.kernel" in refusal(source)
    else:
        assert open_config(source).tie_embeddings in {"own": {False}, "same": {True, False}, "absent": {True}}[head]
