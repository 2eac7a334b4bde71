"""The public names, and what their signatures say."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import beartype
import jax
import numpy as np
import pytest
from jaxtyping import jaxtyped

import tide_jax
from tide_jax import functional
from tide_jax.testing import random_routers, tiny_config, tiny_decoder

PROMPTS = [[3, 4, 5], [6, 7]]


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, its arguments and result checked against its signature."""
    return jaxtyped(typechecker=beartype.beartype)(function)


@pytest.fixture(scope="module")
def engine() -> tide_jax.TIDE:
    """An engine whose public methods are checked."""
    model = tiny_decoder(tiny_config(num_layers=3))

    class Checked(tide_jax.TIDE):
        generate = checked(tide_jax.TIDE.generate)
        stream = checked(tide_jax.TIDE.stream)
        with_config = checked(tide_jax.TIDE.with_config)
        __call__ = checked(tide_jax.TIDE.__call__)

    return Checked(model, random_routers(model.config, interval=1), tide_jax.ExitConfig(min_layers=0))


def test_twelve_names() -> None:
    assert len(tide_jax.__all__) == 12
    assert all(callable(getattr(tide_jax, name)) for name in tide_jax.__all__)


def test_the_functional_layer_has_every_type_in_its_signatures() -> None:
    """Of those that are ours; a user annotates with them."""
    ours = {name: value for name in functional.__all__ if inspect.isfunction(value := getattr(functional, name))}
    for name, function in ours.items():
        for hint in inspect.get_annotations(inspect.unwrap(function), eval_str=False).values():
            for word in str(hint).replace("|", " ").replace("[", " ").replace("]", " ").split():
                known = getattr(inspect.getmodule(inspect.unwrap(function)), word, None)
                if inspect.isclass(known) and known.__module__.startswith("tide_jax"):
                    assert word in functional.__all__, f"{name} takes or returns {word}"


def test_stream_takes_what_generate_takes() -> None:
    ours, theirs = (inspect.signature(f).parameters for f in (tide_jax.TIDE.stream, tide_jax.TIDE.generate))
    assert {name: str(p) for name, p in theirs.items() if name not in ("streamer", "monitor")} == {
        name: str(p) for name, p in ours.items()
    }


@pytest.mark.parametrize(
    "arguments",
    [
        {"max_new_tokens": 2},
        {"max_length": 5, "mode": "full", "eos_token_id": [7], "pad_token_id": 0},
        {"max_new_tokens": 2, "do_sample": True, "temperature": 0.7, "top_k": 5, "top_p": 0.9, "min_p": 0.1},
        {"max_new_tokens": 2, "generation_config": {"repetition_penalty": 1.2}, "suppress_tokens": [1]},
    ],
)
def test_calls_have_the_types_that_are_written(engine: tide_jax.TIDE, arguments: dict[str, Any]) -> None:
    arguments |= {"key": jax.random.key(0)} if "do_sample" in arguments else {}
    out = engine.generate(PROMPTS, **arguments)
    steps = list(engine.stream(PROMPTS, **arguments))
    assert np.stack([step.tokens for step in steps], axis=1).tolist() == out.tokens.tolist()


def test_scores_have_the_types_that_are_written(engine: tide_jax.TIDE) -> None:
    assert engine(PROMPTS, prompt_lengths=1).logits.shape == (2, 3, 259)
    assert engine.with_config(exit_threshold=0.4)(np.asarray([[1, 2]]), mode="full").stats.depth == 1.0


def test_wrong_types_are_seen() -> None:
    """The checks are on: a cache of strings is no capacity."""
    with pytest.raises(Exception, match="capacity"):
        functional.init_cache(tiny_config(), 1, "ten", np.float32)
