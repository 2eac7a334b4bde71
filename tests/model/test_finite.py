"""Answers that are no numbers: every way to ask a model for one refuses them in one line, and numbers pass."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import random_prompts, tiny_model, with_parameters

import tide_jax
from convert import convert, export
from tide_jax import TIDE, CalibrationConfig, ExitConfig
from tide_jax.errors import TideError
from tide_jax.functional import Decoder
from tide_jax.lm_eval.continuations import Continuation, score_continuations
from tide_jax.model.files.shards import cast_in_range
from tide_jax.testing import constant_routers, random_routers, tiny_config

PROMPTS = random_prompts((7, 3))
TEXTS = random_prompts((40,) * 24)
SETTINGS = CalibrationConfig(calibration_samples=24, max_length=40, min_layers=1, checkpoint_interval=1, batch_size=8)
CONFIG = tiny_config(num_layers=2)


@functools.cache
def overflowing(dtype: str = "float16") -> Decoder:
    """A decoder whose second layer leaves float16's range for every token; all its weights are numbers."""
    big = with_parameters(tiny_model(CONFIG), {"layers.1.mlp.down.kernel": 6e4, "layers.0.mlp.down.kernel": 6e4})
    return tide_jax.model.decoder.from_parameters(
        CONFIG, tide_jax.model.decoder.parameters(big).items(), dtype=jnp.dtype(dtype)
    )


@functools.cache
def engine(dtype: str = "float16") -> TIDE:
    return TIDE(overflowing(dtype), random_routers(CONFIG, interval=1), ExitConfig(min_layers=0, exit_threshold=0.99))


CALLS: dict[str, Callable[[TIDE], Any]] = {
    "generate": lambda e: e.generate(PROMPTS, max_new_tokens=3),
    "full depth": lambda e: e.generate(PROMPTS, max_new_tokens=3, mode="full"),
    "sampled": lambda e: e.generate(PROMPTS, max_new_tokens=3, temperature=1.0, key=jax.random.key(0)),
    "prompts exit": lambda e: e.with_config(prefill_exits=True).generate(PROMPTS, max_new_tokens=3),
    "stream": lambda e: list(e.stream(PROMPTS, max_new_tokens=3)),
    "lossless": lambda e: e.generate(PROMPTS, max_new_tokens=3, mode="lossless"),
    "lossless stream": lambda e: list(e.stream(PROMPTS, max_new_tokens=3, mode="lossless")),
    "scoring": lambda e: e(PROMPTS),
    "scoring at full depth": lambda e: e(PROMPTS, mode="full"),
    "continuations": lambda e: score_continuations(e, [Continuation([1, 2], [3, 4]), Continuation([1], [5])]),
    "calibrate": lambda e: tide_jax.calibrate(e.model, None, TEXTS, SETTINGS),
    "guarantee": lambda e: tide_jax.guarantee(e, TEXTS, risk=0.3, delta=0.3, max_length=40),
}


@pytest.mark.matrix
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_no_answer_is_better_than_none(call: Callable[[TIDE], Any]) -> None:
    with pytest.raises(TideError) as caught:
        call(engine())
    message = "the model's logits are not finite in float16: load the model with dtype='bfloat16' or 'float32'"
    assert str(caught.value) == message


@pytest.mark.matrix
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_the_same_weights_answer_in_bfloat16(call: Callable[[TIDE], Any]) -> None:
    call(engine("bfloat16"))


def test_a_damaged_model_is_called_so() -> None:
    damaged = TIDE(with_parameters(tiny_model(CONFIG), {"layers.0.mlp.down.kernel": np.nan}))
    with pytest.raises(TideError, match=r"not finite in float32: its weights or its configuration are damaged"):
        damaged.generate(PROMPTS, max_new_tokens=2)


def late(model: Decoder, token: int) -> Decoder:
    """The model, for which one token's embedding is infinite."""
    table = np.array(tide_jax.model.decoder.parameters(model)["embed.kernel"])
    table[token] = np.inf
    return with_parameters(model, {"embed.kernel": table})


@pytest.mark.matrix
@pytest.mark.parametrize("mode", ["full", "exit", "lossless"])
@pytest.mark.parametrize("streamed", [False, True])
def test_what_overflows_later_is_noticed_then(mode: Any, streamed: bool) -> None:
    """The prompt is answered by numbers; its second new token is not."""
    config = tiny_config(num_layers=3, tie_embeddings=False)
    good = tiny_model(config)
    wanted = TIDE(good).generate(PROMPTS[:1], max_new_tokens=6, eos_token_id=[]).tokens[0].tolist()
    assert wanted[1] not in (*PROMPTS[0], wanted[0])
    bad = TIDE(late(good, wanted[1]), constant_routers(config, interval=1, exits=False), ExitConfig(min_layers=3))
    assert bad.generate(PROMPTS[:1], max_new_tokens=2, eos_token_id=[]).tokens[0].tolist() == wanted[:2]
    options: dict[str, Any] = {"max_new_tokens": 6, "mode": mode, "eos_token_id": []}
    with pytest.raises(TideError, match="not finite in float32"):
        list(bad.stream(PROMPTS[:1], **options)) if streamed else bad.generate(PROMPTS[:1], **options)


@pytest.mark.parametrize("mode", ["full", "lossless"])
@pytest.mark.matrix
def test_what_a_finished_row_would_say_does_not_matter(mode: Any) -> None:
    """The token that overflows ends the row, so that it is never read."""
    config = tiny_config(num_layers=3, tie_embeddings=False)
    good = tiny_model(config)
    wanted = TIDE(good).generate(PROMPTS, max_new_tokens=6, eos_token_id=[])
    last = int(wanted.tokens[0, 2])
    out = TIDE(late(good, last)).generate(PROMPTS, max_new_tokens=6, eos_token_id=[last], mode=mode)
    assert out.tokens[0, :3].tolist() == wanted.tokens[0, :3].tolist()


# ---- what float16 checkpoints of families that overflow it run in ----


@pytest.mark.matrix
@pytest.mark.parametrize(
    ("model_type", "expected"),
    [("gemma3_text", "bfloat16"), ("glm4", "bfloat16"), ("rwkv", "bfloat16"), ("llama", "float16")],
)
def test_the_default_dtype(model_type: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    from convert.parity.tiny import save_tiny

    save_tiny(model_type, tmp_path / "source", dtype="float16")
    assert convert(tmp_path / "source", tmp_path / "out").dtype == "float16", "stored as it was"
    convert(tmp_path / "source", tmp_path / "asked", dtype="float16")
    monkeypatch.setattr(
        tide_jax.model.files.checkpoint, "_default_dtype", lambda: None
    )  # as where there is an accelerator
    for source in ("source", "out"):
        assert tide_jax.load(tmp_path / source).dtype.name == expected
        assert tide_jax.load(tmp_path / source, "float16").dtype.name == "float16"
    assert tide_jax.load(tmp_path / "asked").dtype.name == "float16"
    assert export(tmp_path / "out", tmp_path / "hf").dtype == "float16"


# ---- weights that are numbers, but none that training leaves ----


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_weight_beyond_all_training_is_damage(dtype: str, sign: float) -> None:
    stored = np.full((4, 3), -0.5 * sign).astype(jnp.dtype(dtype))
    np.testing.assert_array_equal(cast_in_range(stored, np.dtype(np.float32), "w"), np.float32(-0.5 * sign))
    if dtype == "float16":  # it has no larger ones: what overflows it is said to
        with pytest.raises(TideError, match="tensor w overflows float16: use bfloat16 or float32"):
            cast_in_range(np.full((2,), 7e4 * sign, np.float32), np.dtype(np.float16), "w")
        return
    stored[1, 2] = sign * 2.0**100
    with pytest.raises(TideError, match=r"tensor w holds a number as large as 1.3e\+30, expected none above 1e\+12"):
        cast_in_range(stored, np.dtype(np.float32), "w")
    for broken in (np.nan, -np.nan, np.inf, -np.inf):
        stored[1, 2] = broken
        with pytest.raises(TideError, match="tensor w holds NaN or infinity"):
            cast_in_range(stored, np.dtype(np.float32), "w")


def test_no_weights_are_no_damage() -> None:
    assert cast_in_range(np.zeros((0, 3), np.float32), np.dtype(np.float16), "w").shape == (0, 3)
