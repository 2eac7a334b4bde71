"""A mesh changes where tensors lie and nothing else: eight devices give the tokens of one."""

from __future__ import annotations

import dataclasses
import fnmatch
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
import sharding_checks
from tiny_llama import CONFIG, random_tensors, save
from tiny_models import CONFIGS, tiny_model

import tide_jax
from convert import convert
from tide_jax import TIDE, TideError
from tide_jax.exits.router import ExitHead
from tide_jax.model.architecture import MoEConfig
from tide_jax.model.decoder import abstract_parameters, summed_axes
from tide_jax.model.rounding import scale_path
from tide_jax.model.sharding import CACHE, PARAMETERS, RULES, _axes, _dotted_path
from tide_jax.testing import random_routers, tiny_config

PROGRAM = Path(sharding_checks.__file__)
WORDS = ("<unk>", "the", "cat", "sat", "on", "a", "mat", "and", "saw", "dog", "it", "ran", "to", "big", "red", "sun")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama checkpoint with two heads for keys and values, a tokenizer of words, and its conversion."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("model")
    config = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 20, "eos_token_id": None}
    save(folder / "source", random_tensors(CONFIG | config), **config)
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(folder / "source")
    convert(folder / "source", folder / "converted")
    return folder


def devices(count: int) -> dict[str, str]:
    """The environment of a process with so many devices."""
    flags = (
        f"--xla_force_host_platform_device_count={count} --xla_backend_optimization_level=0"  # compiles twice as fast
    )
    return os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}


@pytest.fixture(scope="module")
def outcomes(folder: Path) -> dict[str, str]:
    """What came of every check: one process for all, since each would start JAX."""
    command = [sys.executable, str(PROGRAM), "all", str(folder)]
    run = subprocess.run(command, capture_output=True, text=True, env=devices(8), timeout=1500, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("name", sharding_checks.checks(Path()))
def test_on_eight_devices(name: str, outcomes: dict[str, str]) -> None:
    assert outcomes[name] == "ok", outcomes[name]


@pytest.mark.slow
def test_two_processes_make_one_mesh(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, str(PROGRAM), "process", str(folder), port]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": devices(4)}
    runs = [subprocess.Popen([*command, number], **pipes) for number in ("0", "1")]
    try:
        (first, errors), (second, more) = (run.communicate(timeout=300) for run in runs)
    finally:
        for run in runs:
            run.kill()
    assert [run.returncode for run in runs] == [0, 0], errors[-3000:] + more[-3000:]
    generate = ["generate", str(folder / "converted"), "--prompt", "the cat", "--max-new-tokens", "4"]
    assert tide_jax.cli.main.main(generate) == 0
    wanted = capfd.readouterr().out
    assert wanted in first  # gloo says hello on standard output, too
    assert wanted not in second


# ---- in this process, on its one device ----


@pytest.mark.parametrize("name", CONFIGS)
def test_what_no_rule_names_is_small(name: str) -> None:
    """A kernel that a rule forgets would lie whole on every device."""
    config = CONFIGS[name]
    for path, shape in abstract_parameters(config).items():
        axes = _axes(f".{path}", PARAMETERS, len(shape))
        assert len(axes) in (0, len(shape)), path
        parts = ("norm", "router", "positions", "project", "bias", "q_down", "kv_down", "filters")
        small = any(part in path for part in parts) or not SMALL.isdisjoint(path.split("."))
        assert axes or small, f"{path} {shape}"


SMALL = {"fade", "passed", "shares", "bonus", "gates", "by_head", "rate", "fades_down", "gate_down"}
"""What is small in recurrent layers."""


def test_every_rule_is_of_use() -> None:
    """Each pattern names a tensor of some model or its routers, none of them names one of another's."""
    more: tuple[dict[str, Any], ...] = (
        {"attention_experts": MoEConfig(4, 3, 8)},
        {"value_dim": 10, "qkv_bias": True},
        {"qkv_bias": True, "key_bias": False, "attention_gate": "head", "gate_bias": True, "mlp_bias": True},
        {"moe": MoEConfig(4, 2, 8, expert_bias=True)},
    )
    configs = [*CONFIGS.values(), *(tiny_config(num_layers=1, **changes) for changes in more)]
    shapes = {f".{path}": len(shape) for config in configs for path, shape in abstract_parameters(config).items()}
    for config in configs:  # kernels' scales have no rules of their own
        left = {f".{scale_path(path)}": shapes[f".{path}"] - len(axes) for path, axes in summed_axes(config).items()}
        shapes |= {path: rank for path, rank in left.items() if not path.endswith(".scale")}
    model = tiny_model(CONFIGS["parallel"])
    routers = random_routers(model.config, interval=1, affine=True, translator_rank=2, model=model)
    low_rank = dataclasses.replace(routers, heads=(ExitHead((jnp.ones((48, 2)), jnp.ones((2, 48))), jnp.ones(48)),))
    for tree in (routers, low_rank):
        shapes |= {f".{_dotted_path(path)}": leaf.ndim for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
    for pattern, axes in PARAMETERS.items():
        ranks = {rank for path, rank in shapes.items() if fnmatch.fnmatchcase(path, pattern)}
        if axes[-1] is ...:
            assert len(axes) - 1 in ranks or len(axes) in ranks, pattern
            assert len(ranks) > 1, f"{pattern} needs no ellipsis"
        else:
            assert ranks == {len(axes)}, pattern
    for path in shapes:
        assert sum(fnmatch.fnmatchcase(path, pattern) for pattern in PARAMETERS) <= 1, path
    used = {axis for axes in (*PARAMETERS.values(), *CACHE.values()) for axis in axes}
    assert used - {None, ...} == set(RULES)


@pytest.mark.parametrize("shape", ["4", "1x", "0x1", "axb", "1x2x3", "-1x2", "", (1,), (1, 0), (1.0, 1), 4, None])
def test_a_mesh_that_is_none(shape: Any) -> None:
    with pytest.raises(TideError, match=r"must be DATAxMODEL.*'1x4'") as caught:
        tide_jax.make_mesh(shape)
    assert "\n" not in str(caught.value)


def test_more_devices_than_there_are() -> None:
    with pytest.raises(TideError, match=r"mesh=8x64 needs 512 devices, JAX has 1 \(cpu\)"):
        tide_jax.make_mesh((8, 64))


def test_a_mesh_with_other_axes(folder: Path) -> None:
    model = tiny_model(CONFIGS["pre norm"])
    for mesh in (jax.make_mesh((1,), ("data",)), jax.devices()):
        for use in (tide_jax.shard, lambda model, mesh: TIDE(model, mesh=mesh)):
            with pytest.raises(TideError, match='expected axes "data" and "model"'):
                use(model, mesh)
        with pytest.raises(TideError, match='expected axes "data" and "model"'):
            tide_jax.load(folder / "converted", mesh=mesh)


def test_a_mesh_of_one_device() -> None:
    mesh = tide_jax.make_mesh((1, 1))
    model = tiny_model(CONFIGS["pre norm"])
    found, wanted = (TIDE(model, mesh=m).generate([[5, 6, 7]], max_new_tokens=3) for m in (mesh, None))
    assert found.tokens.tolist() == wanted.tokens.tolist()
