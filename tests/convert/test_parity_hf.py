"""Converted models against transformers' own: rotary variants, dtypes, shards, and `--verify`.

Families are in test_family_parity.py.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import tide_jax.model.files.checkpoint
import tide_jax.model.rotary
from convert import convert
from convert.parity.reference import cache_name
from convert.parity.tiny import VOCAB, save_tiny
from convert.verify import TOLERANCE
from tide_jax.errors import TideError
from tide_jax.exits.queue import init_cache
from tide_jax.model.decoder import Decoder

torch = pytest.importorskip("torch")

LENGTH = 24  # beyond every sliding window (7) and every original rotary length (16)


def make_pair(directory: Path, model_type: str, **overrides: Any) -> tuple[Any, Decoder]:
    reference = save_tiny(model_type, directory / "hf", **overrides)
    convert(directory / "hf", directory / "converted")
    return reference, tide_jax.model.files.checkpoint.load(directory / "converted", "float32")


def random_tokens(rows: int, length: int = LENGTH) -> np.ndarray:
    return np.random.default_rng(7).integers(4, VOCAB, (rows, length))


def reference_logits(reference: Any, tokens: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return reference(input_ids=torch.tensor(tokens)).logits.numpy()


def reference_steps(reference: Any, tokens: np.ndarray) -> np.ndarray:
    """Logits of one token at a time, through transformers' cache."""
    cache, logits, name = None, [], cache_name(reference)
    with torch.no_grad():
        for t in range(tokens.shape[1]):
            out = reference(input_ids=torch.tensor(tokens[:, t : t + 1]), **{name: cache}, use_cache=True)
            cache = getattr(out, name)
            logits.append(out.logits.numpy())
    return np.concatenate(logits, axis=1)


def our_logits(model: Decoder, tokens: np.ndarray) -> np.ndarray:
    return np.asarray(model(jnp.asarray(tokens, jnp.int32)))


def our_steps(model: Decoder, tokens: np.ndarray) -> np.ndarray:
    """Logits of one token at a time, through our cache."""
    cache = init_cache(model.config, *tokens.shape, jnp.dtype(jnp.float32))
    logits = []
    for t in range(tokens.shape[1]):
        positions = jnp.full((len(tokens), 1), t, jnp.int32)
        x, rows = model.run_layers(jnp.asarray(tokens[:, t : t + 1], jnp.int32), positions, cache)
        logits.append(np.asarray(model.logits(model.final_norm(x))))
        cache = cache.append(rows, positions, model.layers)
    return np.concatenate(logits, axis=1)


def assert_close(found: np.ndarray, expected: np.ndarray) -> None:
    difference, spread = np.abs(found - expected).max(), np.ptp(expected)
    assert spread > 5, "the reference's logits hardly differ: nothing is tested"
    assert difference <= TOLERANCE * spread, f"max |d logit| {difference:.2e} of a range of {spread:.1f}"


def _rope(kind: str, **settings: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 500.0, **settings}}


_LONG = {"short_factor": [1.0, 1.1, 1.3, 1.5, 2.0], "long_factor": [1.0, 2.0, 3.0, 4.0, 5.0]}
_ROPES = {
    "default": _rope("default"),
    "linear": _rope("linear", factor=3.0),
    "dynamic": _rope("dynamic", factor=2.0) | {"max_position_embeddings": 16},
    "llama3": _rope(
        "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16
    ),
    "yarn": _rope("yarn", factor=4.0, original_max_position_embeddings=16),
    "yarn_exact_ramp": _rope(
        "yarn", factor=4.0, original_max_position_embeddings=16, truncate=False, beta_fast=8, beta_slow=0.5
    ),
    "yarn_mscale": _rope("yarn", factor=4.0, original_max_position_embeddings=16, mscale=0.7, mscale_all_dim=1.3),
    "yarn_attention_factor": _rope("yarn", factor=4.0, original_max_position_embeddings=16, attention_factor=1.7),
    "longrope": _rope("longrope", original_max_position_embeddings=16, **_LONG),
    "longrope_factor": _rope("longrope", factor=2.0, original_max_position_embeddings=16, **_LONG),
}


@pytest.mark.matrix
@pytest.mark.parametrize("rope", _ROPES)
def test_rotary_variants(rope: str, tmp_path: Path) -> None:
    reference, model = make_pair(tmp_path, "llama", num_hidden_layers=2, head_dim=10, **_ROPES[rope])
    below, above = random_tokens(2, 12), random_tokens(2)
    assert_close(our_steps(model, above), reference_steps(reference, above))
    for tokens in (below, above):
        assert_close(our_logits(model, tokens), reference_logits(reference, tokens))


def test_sharded_bfloat16_checkpoint(tmp_path: Path) -> None:
    reference, model = make_pair(tmp_path, "mixtral", dtype="bfloat16", max_shard_size="60KB")
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 2
    tokens = random_tokens(2)
    assert_close(our_logits(model, tokens), reference_logits(reference, tokens))
    assert tide_jax.model.files.checkpoint.load(tmp_path / "hf", "bfloat16").dtype == jnp.bfloat16


def test_verify_records_the_difference(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    save_tiny("llama", tmp_path / "hf")
    report = convert(tmp_path / "hf", tmp_path / "converted", verify=True)
    assert report.verification is not None
    assert 0 < report.verification.relative < TOLERANCE
    assert math.isclose(
        report.verification.relative * report.verification.logit_range, report.verification.max_difference
    )


@pytest.mark.parametrize("source_dtype, dtype", [("bfloat16", None), ("float32", "bfloat16"), ("float32", "float16")])
def test_verify_holds_smaller_dtypes_to_the_same_tolerance(
    source_dtype: str, dtype: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("accelerate")
    rope = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
    save_tiny("llama", tmp_path / "hf", dtype=source_dtype, rope_parameters=rope)
    report = convert(tmp_path / "hf", tmp_path / "right", dtype=dtype, verify=True)
    assert report.verification is not None
    assert report.verification.relative < TOLERANCE
    monkeypatch.setitem(tide_jax.model.rotary._STATIC, "linear", tide_jax.model.rotary._default)
    with pytest.raises(TideError, match="logits differ from transformers'"):
        convert(tmp_path / "hf", tmp_path / "wrong", dtype=dtype, verify=True)


def test_verify_looks_beyond_windows_and_original_lengths(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    settings = {"sliding_window": 70, "max_position_embeddings": 200}
    save_tiny("mistral", tmp_path / "hf", **settings)
    proof = convert(tmp_path / "hf", tmp_path / "converted", verify=True).verification
    assert proof is not None
    assert (proof.row_length, proof.tokens) == (140, 140 + 94)
    rope = {"rope_type": "longrope", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 40, **_LONG}
    save_tiny("llama", tmp_path / "long", rope_parameters=rope, max_position_embeddings=160, head_dim=10)
    proof = convert(tmp_path / "long", tmp_path / "long-converted", verify=True).verification
    assert proof is not None
    assert proof.row_length == 80


@pytest.mark.parametrize("value", [0.0, 3.0])
def test_verify_refuses_logits_that_prove_nothing(value: float, tmp_path: Path) -> None:
    """All logits are one number: anything that computes that number too would pass."""
    pytest.importorskip("accelerate")
    save_tiny("llama", tmp_path / "hf", tie_word_embeddings=False)
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    tensors["lm_head.weight"] = np.full_like(tensors["lm_head.weight"], value)
    save_file(tensors, tmp_path / "hf" / "model.safetensors", {"format": "pt"})
    with pytest.raises(TideError, match="are the same for every token, which proves nothing"):
        convert(tmp_path / "hf", tmp_path / "converted", verify=True)
    assert {path.name for path in tmp_path.iterdir()} == {"hf"}


def test_verify_refuses_a_wrong_conversion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("accelerate")
    save_tiny("llama", tmp_path / "hf")

    def load_wrongly(path: Path, dtype: str) -> Decoder:
        model = tide_jax.model.files.checkpoint.load(path, dtype)
        model.final_norm.eps = 0.5
        return model

    monkeypatch.setattr("convert.conversion.load", load_wrongly)
    with pytest.raises(TideError, match="logits differ from transformers'"):
        convert(tmp_path / "hf", tmp_path / "converted", verify=True)
    assert {path.name for path in tmp_path.iterdir()} == {"hf"}
