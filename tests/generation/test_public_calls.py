"""Whatever is passed to a public call: TideError in one line, or a result; never another exception."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import tide_jax
from tide_jax import TIDE, CalibrationConfig, DriftMonitor, ExitConfig, Routers, TideError
from tide_jax.testing import ByteTokenizer, random_routers, tiny_config, tiny_decoder

WRONG: dict[str, Any] = {
    "None": None,
    "an object": object(),
    "a string": "seven",
    "an empty string": "",
    "bytes": b"7",
    "NaN": float("nan"),
    "infinity": float("inf"),
    "a negative number": -3,
    "a fraction": 2.5,
    "a huge number": 2**70,
    "a complex number": 1j,
    "a boolean": True,
    "a list": [[1, [2]], "three"],
    "an empty list": [],
    "a set": {1, 2},
    "a dictionary": {"a": 1},
    "four axes": np.ones((1, 1, 1, 2)),
    "an array of objects": np.asarray([object()], object),
    "a ragged list": [[1], [2, 3]],
    "no rows": np.zeros((0, 3), int),
    "a function": lambda *_: None,
    "a class": int,
    "an exception": ValueError("no"),
}


@functools.cache
def model() -> Any:
    return tiny_decoder(tiny_config(num_layers=3, max_positions=12))


@functools.cache
def engine() -> TIDE:
    return TIDE(model(), random_routers(model().config, interval=1), ExitConfig(min_layers=0))


def first_step(ids: Any = ((3, 4),), **arguments: Any) -> Any:
    return next(iter(engine().stream(ids, **{"max_new_tokens": 1} | arguments)))


def generate(ids: Any = ((3, 4),), **arguments: Any) -> Any:
    return engine().generate(ids, **{"max_new_tokens": 1} | arguments)


def calibrate(**arguments: Any) -> Any:
    texts = ["a text of some length"] * 3  # too few to train on: a right call is refused, too
    given = {"model": model(), "tokenizer": ByteTokenizer(), "texts": texts} | arguments
    return tide_jax.calibrate(**given)


def guarantee(**arguments: Any) -> Any:
    given = {"engine": engine(), "texts": [[1, 2, 3]] * 3, "risk": 0.1, "delta": 0.1} | arguments
    return tide_jax.guarantee(**given)


def tide(**arguments: Any) -> Any:
    return TIDE(**{"model": model()} | arguments)


GENERATION = ("ids", "attention_mask", "max_new_tokens", "mode", "temperature", "top_k", "top_p", "min_p")
GENERATION += ("repetition_penalty", "eos_token_id", "pad_token_id", "key")
CALLS: dict[str, tuple[Callable[..., Any], tuple[str, ...]]] = {
    "TIDE": (tide, ("model", "routers", "config", "implementation", "mesh", "max_programs", "cuda_graphs")),
    "with_config": (engine().with_config, tuple(ExitConfig.__dataclass_fields__)),
    "generate": (generate, (*GENERATION, "streamer", "monitor")),
    "stream": (first_step, GENERATION),
    "score": (
        lambda input_ids=((3, 4),), **a: engine()(input_ids, **a),
        ("input_ids", "attention_mask", "mode", "prompt_lengths", "monitor"),
    ),
    "ExitConfig": (ExitConfig, tuple(ExitConfig.__dataclass_fields__)),
    "ExitConfig.from_dict": (ExitConfig.from_dict, ("values",)),
    "CalibrationConfig": (CalibrationConfig, tuple(CalibrationConfig.__dataclass_fields__)),
    "calibrate": (calibrate, ("model", "tokenizer", "texts", "config", "work_dir", "mesh")),
    "guarantee": (
        guarantee,
        ("engine", "texts", "risk", "delta", "loss", "thresholds", "bound", "max_length", "batch_size", "seed"),
    ),
    "DriftMonitor": (DriftMonitor, ("rate", "seed", "risk", "delta")),
    "make_mesh": (tide_jax.make_mesh, ("shape",)),
    "shard": (lambda tree=None, mesh=None: tide_jax.shard(model() if tree is None else tree, mesh), ("tree", "mesh")),
    "load": (functools.partial(tide_jax.load, "/nowhere"), ("dtype", "mesh")),
    "load a path": (tide_jax.load, ("source",)),
    "load_tokenizer": (tide_jax.load_tokenizer, ("path",)),
    "Routers.load": (
        lambda path="/nowhere", **a: Routers.load(path, **({"model": model()} | a)),
        ("path", "model", "checkpoint_interval"),
    ),
    "Routers.save": (lambda path: engine().routers.save(path), ("path",)),
}


@pytest.mark.parametrize("call, name", [(call, name) for call, (_, names) in CALLS.items() for name in names])
def test_only_tide_errors_leave_a_public_call(
    call: str, name: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    function, told = CALLS[call][0], list[str]()
    for what, value in WRONG.items():
        positional = call in ("load a path", "load_tokenizer", "make_mesh", "Routers.save", "ExitConfig.from_dict")
        try:
            function(value) if positional else function(**{name: value})
        except TideError as error:
            told.append(str(error))
        except Exception as error:
            raise AssertionError(f"{call}({name}={what}) raised {type(error).__name__}: {error}") from error
    assert not any("\n" in message for message in told)
    assert max(map(len, told), default=0) < 600


def test_masked_arrays_are_refused() -> None:
    masked = np.ma.array([[3, 4, 5]], mask=[[True, False, False]])
    with pytest.raises(TideError, match="masked array"):
        generate(masked)
    assert generate(np.ma.array([[3, 4, 5]])).tokens.tolist() == generate([[3, 4, 5]]).tokens.tolist()
