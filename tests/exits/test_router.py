"""Routers on disk: exact round trips, and files that are damaged or belong to something else."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file
from tiny_models import tiny_model

from tide_jax import Routers, TideError
from tide_jax.config import CalibrationConfig, exit_point_layers
from tide_jax.exits import router_file
from tide_jax.exits.router import ExitHead, Router, RouterMetadata, model_identity
from tide_jax.exits.router_file import round_columns, round_half
from tide_jax.functional import Decoder
from tide_jax.model.decoder import from_parameters, parameters
from tide_jax.model.files.checkpoint import fingerprint
from tide_jax.testing import random_routers, tiny_config

MODEL = tiny_model(tiny_config())


def made_for(
    model: Decoder, *, affine: bool = False, translator_rank: int | None = None, seed: int = 0, **metadata: Any
) -> Routers:
    """Random routers that say they belong to a model."""
    values = model_identity(model) | {"config": {"checkpoint_interval": 2}} | metadata
    routers = random_routers(model.config, affine=affine, translator_rank=translator_rank, seed=seed)
    return dataclasses.replace(routers, metadata=RouterMetadata.from_dict(values))


def rounded(routers: Routers, rank: int) -> Routers:
    """Weights as calibration leaves them; heads of low rank."""

    def low_rank(head: ExitHead) -> ExitHead:
        (factor,) = head.factors
        return ExitHead((round_half(factor[:, :rank]), round_half(factor[:rank])), round_half(head.bias))

    return dataclasses.replace(
        routers,
        routers=tuple(r._replace(down=round_columns(r.down)) for r in routers.routers),
        heads=None if routers.heads is None else tuple(low_rank(head) for head in routers.heads),
    )


def same_weights(found: Routers, expected: Routers) -> None:
    found_leaves, expected_leaves = jax.tree.leaves(found), jax.tree.leaves(expected)
    assert jax.tree.structure(found.without_metadata()) == jax.tree.structure(expected.without_metadata())
    for a, b in zip(found_leaves, expected_leaves, strict=True):
        assert a.dtype == jnp.float32
        np.testing.assert_array_equal(a, b)


def refused(path: Path, expected: str, **arguments: Any) -> None:
    with pytest.raises(TideError, match=expected) as caught:
        Routers.load(path, **({"model": MODEL} | arguments))
    assert "\n" not in str(caught.value)
    assert path.name in str(caught.value)


# --------------------------------------------------------------------------------------------------------- round trips


@pytest.mark.parametrize("affine", [False, True], ids=["identity", "affine"])
@pytest.mark.parametrize("low_precision", [False, True], ids=["float32", "rounded"])
def test_saving_and_loading_changes_nothing(tmp_path: Path, affine: bool, low_precision: bool) -> None:
    routers = made_for(MODEL, affine=affine, report={"exit_points": [1, 2]})
    routers = rounded(routers, rank=5) if low_precision else routers
    path = tmp_path / "new" / "routers.safetensors"
    routers.save(path)
    loaded = Routers.load(path, model=MODEL, checkpoint_interval=2)
    same_weights(loaded, routers)
    assert loaded.report == {"exit_points": [1, 2]}
    assert loaded.exit_strategy == ("affine" if affine else "identity")
    assert [p.name for p in path.parent.iterdir()] == ["routers.safetensors"], (
        "heads never lie apart from their routers"
    )
    with safe_open(path, framework="np") as file:
        assert file.get_tensor("1.down").dtype == (np.int8 if low_precision else np.float32)
    loaded.save(tmp_path / "again.safetensors")
    same_weights(Routers.load(tmp_path / "again.safetensors", model=MODEL), routers)


@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1.0, 300.0])
def test_rounding_columns_is_done_once_and_stays_close(scale: float) -> None:
    rng = np.random.default_rng(0)
    weights = (scale * rng.normal(size=(33, 7))).astype(np.float32)
    weights[:, 3] = 0
    once = round_columns(weights)
    np.testing.assert_array_equal(round_columns(once), once)
    step = np.abs(weights).max(axis=0) / 127
    assert (np.abs(once - weights) <= 0.51 * step + 127 * step / 256 + 1e-44).all()
    assert (once[:, 3] == 0).all()


def test_the_file_of_a_large_model_stays_small(tmp_path: Path) -> None:
    config, width, layers = CalibrationConfig(), 4096, 32
    exit_points = exit_point_layers(layers, config.checkpoint_interval)
    assert len(exit_points) == 7
    rng, hidden = np.random.default_rng(0), config.router_bottleneck_dim
    router = Router(
        down=jnp.asarray(round_columns(rng.normal(size=(width, hidden)))),
        down_bias=jnp.asarray(rng.normal(size=hidden), jnp.float32),
        up=jnp.asarray(rng.normal(size=hidden), jnp.float32),
        up_bias=jnp.float32(0.1),
    )
    Routers((router,) * 7, None, exit_points).save(tmp_path / "large.safetensors")
    assert (tmp_path / "large.safetensors").stat().st_size <= 4.2e6


def test_the_fingerprint_is_the_models_whatever_its_dtype() -> None:
    tensors = parameters(MODEL)
    half = from_parameters(MODEL.config, tensors.items(), dtype=jnp.bfloat16)
    assert fingerprint(half) == fingerprint(MODEL) == fingerprint(tiny_model(tiny_config(eos_token_ids=(4,))))
    others = [tiny_model(tiny_config(), seed=1), tiny_model(tiny_config(norm_eps=1e-5))]
    assert len({fingerprint(model) for model in [MODEL, *others]}) == 3


# --------------------------------------------------------------------------------------------------------------- files


def truncate(content: bytes) -> bytes:
    return content[: len(content) // 2]


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "truncated": truncate,
    "cut in its header": lambda content: content[:20],
    "empty": lambda content: b"",
    "random bytes": lambda content: np.random.default_rng(0).bytes(500),
    "header of garbage": lambda content: content[:8] + b"\xff" * 40 + content[48:],
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_files_are_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "routers.safetensors"
    made_for(MODEL).save(path)
    path.write_bytes(DAMAGE[kind](path.read_bytes()))
    refused(path, "is damaged")


def test_a_missing_file(tmp_path: Path) -> None:
    refused(tmp_path / "nothing.safetensors", "no router file at")
    refused(tmp_path, "no router file at")


def test_another_safetensors_file(tmp_path: Path) -> None:
    save_file({"weight": np.zeros(3, np.float32)}, tmp_path / "model.safetensors")
    refused(tmp_path / "model.safetensors", "holds no routers")


def test_another_version(tmp_path: Path) -> None:
    path = tmp_path / "routers.safetensors"
    made_for(MODEL).save(path)
    with safe_open(path, framework="np") as file:
        metadata = file.metadata() | {"version": "99"}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    save_file(tensors, path, metadata=metadata)
    refused(path, "router format 99")


def test_another_model_is_refused_with_both_names(tmp_path: Path) -> None:
    path = tmp_path / "routers.safetensors"
    made_for(MODEL).save(path)
    other = tiny_model(tiny_config(num_layers=4, model_type="other"))
    refused(path, r"tiny, 6 layers of width 48 .*, this model is other, 4 layers of width 48 ", model=other)
    refused(path, f"{fingerprint(MODEL)}.*calibrate", model=tiny_model(tiny_config(), seed=1))


def test_another_exit_point_interval_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "routers.safetensors"
    made_for(MODEL).save(path)
    refused(path, "every 2 layers, expected every 4", checkpoint_interval=4)


@pytest.mark.parametrize("affine", [False, True])
def test_a_place_that_cannot_be_written(tmp_path: Path, affine: bool) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(TideError, match="can't write"):
        made_for(MODEL, affine=affine).save(tmp_path / "file" / "routers.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


# ------------------------------------------------------------------------------------------------------ what is written


def test_the_same_routers_are_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        made_for(MODEL, affine=True, translator_rank=3, report={"b": 1, "a": 2}).save(tmp_path / name)
    loaded = Routers.load(tmp_path / "one", model=MODEL)
    loaded.save(tmp_path / "three")
    one, two, three = ((tmp_path / name).read_bytes() for name in ("one", "two", "three"))
    assert one == two == three
    header = json.loads(one[8 : 8 + int.from_bytes(one[:8], "little")])
    assert list(header) == sorted(header)
    assert list(header["__metadata__"]) == sorted(header["__metadata__"])
    with safe_open(tmp_path / "one", framework="np") as file:  # as any program reads it
        found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    assert found.keys() == header.keys() - {"__metadata__"}


@pytest.mark.parametrize("fails", ["replace", "fsync"])
def test_a_failed_save_leaves_the_earlier_file(fails: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "routers.safetensors"
    made_for(MODEL, affine=True).save(path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, fails, full)
    with pytest.raises(TideError, match="No space left"):
        made_for(MODEL, affine=True, seed=1).save(path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_temporaries_of_dead_runs_are_removed(tmp_path: Path) -> None:
    path = tmp_path / "routers.safetensors"
    dead = tmp_path / f".{path.name}.{os.getpid()}-0a1b-lock.partial"
    other = tmp_path / f".other.safetensors.{os.getpid()}-0a1b-lock.partial"
    for file in (dead, other):
        file.write_bytes(b"half")
    made_for(MODEL).save(path)
    assert sorted(file.name for file in tmp_path.iterdir()) == [other.name, path.name]


def test_a_save_goes_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link.safetensors").symlink_to("disk/routers.safetensors")
    for seed in (0, 1):
        routers = made_for(MODEL, seed=seed)
        routers.save(tmp_path / "link.safetensors")
        same_weights(Routers.load(tmp_path / "disk" / "routers.safetensors", model=MODEL), routers)
    assert (tmp_path / "link.safetensors").is_symlink()


@pytest.mark.parametrize("exit_points", [None, [3, 1], [1, 1], [99], ["1"], [True], 3, {}])
def test_nonsense_exit_points_are_refused(tmp_path: Path, exit_points: Any) -> None:
    path = tmp_path / "routers.safetensors"
    router_file.write(path, router_file.encode({}, model_identity(MODEL) | {"exit_points": exit_points}))
    refused(path, "names exit points")


def test_a_router_that_does_not_fit_together_is_refused(tmp_path: Path) -> None:
    path, size = tmp_path / "routers.safetensors", MODEL.config.hidden_size
    shapes = {"down": (size, 4), "down_bias": (4,), "up": (5,), "up_bias": ()}
    tensors = {f"1.{name}": np.zeros(shape, np.float32) for name, shape in shapes.items()}
    router_file.write(path, router_file.encode(tensors, model_identity(MODEL) | {"exit_points": [1]}))
    refused(path, r"tensor 1\.up is of shape \(5,\), expected shape \(4,\)")


def test_another_mlp_is_another_model(tmp_path: Path) -> None:
    path = tmp_path / "routers.safetensors"
    made_for(MODEL).save(path)
    changed = {n: -a if n.endswith("mlp.down.kernel") else a for n, a in parameters(MODEL).items()}
    refused(path, "calibrated for", model=from_parameters(MODEL.config, changed.items(), dtype=jnp.float32))
