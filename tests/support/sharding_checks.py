"""Checks of tests/model/test_sharding.py on eight devices; a program, for JAX counts its devices once a process.

``python sharding_checks.py all FOLDER`` prints a JSON object: for each check "ok", or how it failed. ``python
sharding_checks.py process FOLDER PORT NUMBER`` is one of two processes of four devices each.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from tiny_models import CONFIGS, random_prompts, tiny_model

import tide_jax
import tide_jax.cli.main
from tide_jax import TIDE, DriftMonitor, ExitConfig
from tide_jax.exits.queue import keys_and_values
from tide_jax.functional import Decoder, PassCosts, init_cache
from tide_jax.generation.generate import advance, begin
from tide_jax.generation.programs import Programs
from tide_jax.model.decoder import from_parameters, parameters
from tide_jax.model.sharding import _dotted_path, split_rows
from tide_jax.testing import random_routers, tiny_config

NEW = 12
PROMPTS = random_prompts((7, 1, 12, 9, 3, 5, 2, 8), vocab=200)
FREE = PassCosts(np.ones(3, np.float32), np.zeros(1, np.float32), np.float32(0))  # every draft is worth a try
TWIN = FREE._replace(drafts=np.float32([0, 0.01]))
EVEN = tiny_config(
    num_layers=2, vocab_size=264, hidden_size=64, num_heads=16, num_kv_heads=8, head_dim=8, intermediate_size=96
)
MODELS = {
    "even": EVEN,  # everything divides by 8
    "three heads": dataclasses.replace(
        EVEN, num_heads=6, num_kv_heads=3, vocab_size=259, num_layers=3, layer_pattern=(0,) * 3
    ),
    "experts": CONFIGS["experts"],
    "latent attention": CONFIGS["latent attention"],
    "hybrid": CONFIGS["hybrid"],
    "side by side": dataclasses.replace(CONFIGS["side by side"], num_layers=2, layer_pattern=(0, 0)),
    "other recurrences": CONFIGS["other recurrences"],
}
CASES: dict[tuple[str, str], tuple[str, ...]] = {
    ("even", "2x4"): ("full", "propagate", "recompute", "lossless", "lossless int8", "stream", "score"),
    ("even", "1x8"): ("propagate", "lossless", "lossless int8"),
    ("even", "8x1"): ("full", "propagate"),
    ("even", "1x2"): ("recompute",),
    ("three heads", "4x2"): ("propagate",),
    ("experts", "2x4"): ("propagate",),
    ("latent attention", "1x2"): ("propagate",),
    ("hybrid", "2x4"): ("propagate",),  # more devices than Mamba-2 has groups and the delta net has keys
    ("side by side", "2x2"): ("recompute", "lossless int8"),
    ("other recurrences", "2x2"): ("propagate",),
}


@functools.cache
def engine_of(name: str, shape: str | None = None) -> TIDE:
    """An engine whose rows leave at different depths, on a mesh or none."""
    mesh = None if shape is None else tide_jax.make_mesh(shape)
    model = tiny_model(MODELS[name])
    routers = random_routers(model.config, interval=1, affine=True, translator_rank=4, model=model)
    engine = TIDE(model, routers, ExitConfig(exit_threshold=0.5, min_layers=0), mesh=mesh)
    for draft, costs in (("text", FREE), ("int8", TWIN)):
        engine._learned._costs[len(PROMPTS), draft] = costs  # measured costs would draft now this, now that
    return engine


def run(engine: TIDE, mode: str) -> list[np.ndarray]:
    """The arrays that a mode gives, tokens first."""
    if mode == "score":
        width = max(map(len, PROMPTS))
        ids = np.asarray([row + [0] * (width - len(row)) for row in PROMPTS])
        mask = np.asarray([[1] * len(row) + [0] * (width - len(row)) for row in PROMPTS])
        out = engine(ids, attention_mask=mask, prompt_lengths=2)
        return [out.exit_layers, np.where(mask[:, :, None], np.asarray(out.logits), 0)]
    name = mode.removeprefix("stream").strip()
    name = name or "recompute"
    if name in ("propagate", "recompute"):
        engine, name = engine.with_config(kv_strategy=name), "exit"
    if mode.startswith("stream"):
        steps = list(engine.stream(PROMPTS, mode=name, max_new_tokens=NEW))
        return [np.stack([s.tokens for s in steps], axis=1), np.stack([s.exit_layers for s in steps], axis=1)]
    name, *draft = name.split()
    out = engine.generate(PROMPTS, mode=name, draft=draft[0] if draft else None, max_new_tokens=NEW)
    assert not draft or out.stats.drafts.by_drafter["int8 twin"].accepted > 0
    return [out.tokens, out.exit_layers]


@functools.cache
def alone(name: str, mode: str) -> list[np.ndarray]:
    """What a mode gives without a mesh; lossless tokens are those of full depth, streams those of whole calls."""
    return run(engine_of(name), {"stream": "recompute"}.get(mode, "full" if "lossless" in mode else mode))


def same(name: str, shape: str, modes: tuple[str, ...]) -> None:
    """Equal tokens and exits, and scores within 1e-4."""
    engine = engine_of(name, shape)
    for mode in modes:
        for found, wanted in zip(run(engine, mode), alone(name, mode), strict=True):
            np.testing.assert_allclose(found, wanted, atol=1e-4 if wanted.dtype == np.float32 else 0, err_msg=mode)


def leaves_differ() -> None:
    """The cases above would show little if all tokens left at one layer."""
    assert len(np.unique(alone("even", "propagate")[1])) == 2


def weights_are_split() -> None:
    """On eight devices each holds an eighth, but for what is small."""
    engine = engine_of("even", "1x8")
    held = {path: shard_shape(a) for path, a in kept(engine.model).items()}
    assert held["embed.kernel"] == (33, 64)
    assert held["layers.1.attention.q.kernel"] == (2, 8, 64)
    assert held["layers.1.attention.kv.kernel"] == (1, 2, 8, 64)
    assert held["layers.1.attention.out.kernel"] == (64, 2, 8)
    assert held["layers.1.mlp.gate_up.kernel"] == (2, 12, 64)
    assert held["layers.1.mlp.down.kernel"] == (64, 12)
    assert held["final_norm.scale"] == (64,)
    whole = {path: a.shape for path, a in kept(engine.model).items()}
    assert {path for path in held if held[path] == whole[path]} == {path for path in held if "norm" in path}
    routers = engine._weights
    assert shard_shape(routers.heads[0].factors[0]) == (64, 8)
    assert shard_shape(routers.candidates.rows.kernel) == (11, 64)
    assert shard_shape(routers.routers[0].down) == (64, 16)


def integers_are_split() -> None:
    """8-bit weights, dense and of experts, with their scales; tokens stay what they are on one device."""
    for name, shape in (("even", "1x4"), ("experts", "1x2")):
        floats, mesh = tiny_model(MODELS[name]), tide_jax.make_mesh(shape)
        tensors, options = parameters(floats), {"dtype": floats.dtype, "weights": "int8"}
        split, plain = (from_parameters(floats.config, tensors.items(), mesh=m, **options) for m in (mesh, None))
        held = {path: shard_shape(a) for path, a in kept(split).items()}
        if name == "even":
            assert (held["layers.1.attention.q.kernel"], held["layers.1.attention.q.scale"]) == ((4, 8, 64), (4, 8))
            assert (held["layers.1.mlp.gate_up.kernel"], held["layers.1.mlp.gate_up.scale"]) == ((2, 24, 64), (2, 24))
            assert (held["layers.1.mlp.down.kernel"], held["layers.1.mlp.down.scale"]) == ((64, 24), (64,))
            assert (held["embed.kernel"], held["embed.scale"]) == ((66, 64), (66,))
        else:
            assert held["layers.1.mlp.experts.gate_up"] == (5, 48, 2, 20)
            assert held["layers.1.mlp.experts.gate_up_scale"] == (5, 2, 20)
        found, wanted = (TIDE(model).generate(PROMPTS[:2], max_new_tokens=5).tokens for model in (split, plain))
        np.testing.assert_array_equal(found, wanted)
        assert tide_jax.model.files.checkpoint.fingerprint(split) == tide_jax.model.files.checkpoint.fingerprint(floats)


def uneven_axes_stay_whole() -> None:
    """Tensor by tensor: three heads stay on every device where the query heads, two each, are split."""
    engine = engine_of("three heads", "4x2")
    held = {path: shard_shape(a) for path, a in kept(engine.model).items()}
    assert held["layers.0.attention.kv.kernel"] == (3, 2, 8, 64)
    assert held["layers.0.attention.q.kernel"] == (3, 8, 64)
    assert held["layers.0.mlp.down.kernel"] == (64, 48)
    assert held["embed.kernel"] == (259, 64)


def kept(model: Decoder) -> dict[str, jax.Array]:
    """Parameters as they lie on the devices, by dotted path."""
    return {_dotted_path(path): array for path, array in jax.tree_util.tree_leaves_with_path(model)}


def shard_shape(array: jax.Array) -> tuple[int, ...]:
    """Shape of what one device holds."""
    shapes = {shard.data.shape for shard in array.addressable_shards}
    assert len(shapes) == 1
    return shapes.pop()


def steps_of(engine: TIDE, prompts: list[list[int]], new: int) -> tuple[list[Any], str]:
    """What a device holds of the cache in the first three steps, and the program of a step."""
    call, held = engine._call(prompts, None, max_new_tokens=new), []
    arguments = (call.prompt, call.request, call.exits)
    state, _, _ = engine.programs.run(begin, (engine.model,), arguments, capacity=call.capacity)
    for _ in range(3):
        kv = keys_and_values(state.cache)
        held.append({shard_shape(a) for a in jax.tree.leaves(kv.layers)})
        arguments = (state, call.request, call.exits)
        state, _, _ = engine.programs.run(advance, (engine.model,), arguments, donate=1)
    # One program: a step's result goes into the next as it is.
    (text,) = (program.as_text() for key, program in engine.programs._compiled.items() if key[0] is advance)
    return held, text


def cache_is_split() -> None:
    """Heads over "model", rows over "data", from the first step on."""
    held, _ = steps_of(engine_of("even", "2x4").with_config(kv_strategy="recompute"), PROMPTS, NEW)
    assert held == [{(4, 2, 39, 8)}] * 3, held
    with jax.set_mesh(tide_jax.make_mesh("2x4")):  # for those who call the pure functions
        cache = init_cache(EVEN, 8, 16, np.dtype(np.float32))
        assert {shard_shape(a) for a in jax.tree.leaves(cache.layers)} == {(4, 2, 16, 8)}


def results_take_the_place_of_what_is_donated() -> None:
    """Even where the partitioner would lay them out otherwise."""
    programs = Programs(tide_jax.make_mesh("2x4"))
    state = split_rows(np.zeros((8, 3), np.float32), tide_jax.make_mesh("2x4"))

    def step(model: Any, state: jax.Array) -> jax.Array:
        return jax.lax.with_sharding_constraint(state + model, jax.sharding.PartitionSpec())

    for _ in range(2):
        state, _, compiled = programs.run(step, (np.float32(1),), (state,), donate=1)
        assert shard_shape(state) == (4, 3)
    assert compiled == 0


def two_sums_a_layer() -> None:
    """A step sums the stream twice in each layer, and moves neither weights nor the cache."""
    held, text = steps_of(engine_of("even", "1x4"), PROMPTS[:1], 48)
    assert held == [{(1, 2, 64, 8)}] * 3, held
    moved = [size for size in moved_sizes(text) if size > 16]
    # Once for the embedding, once to put together the answer of the exit: 64 channels each.
    assert moved == [64] * (2 * EVEN.num_layers + 2), moved


def moved_sizes(text: str) -> Iterator[int]:
    """Numbers that each collective operation of a program gives."""
    for line in re.findall(r"= (.*?) (?:all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)", text):
        for shape in re.findall(r"\w+\[([\d,]*)\]", line):
            yield int(np.prod([int(n) for n in shape.split(",") if n]))


def loading_splits(folder: Path) -> None:
    """Each tensor goes from the host to its devices, and the model is the one loaded without a mesh."""
    given = []
    place = tide_jax.model.decoder.place

    def spied(path: str, tensor: Any, mesh: Any) -> jax.Array:
        given.append((path, type(tensor)))
        return place(path, tensor, mesh)

    tide_jax.model.decoder.place = spied
    mesh, routes = tide_jax.make_mesh("1x2"), ("source", "converted")
    for route in routes:
        model, plain = tide_jax.load(folder / route, mesh=mesh), kept(tide_jax.load(folder / route))
        for path, array in kept(model).items():
            np.testing.assert_array_equal(array, plain[path])
            assert path.endswith("scale") or array.addressable_shards[0].data.size == array.size // 2, path
        again = tide_jax.shard(model, mesh)
        assert all(a is b for a, b in zip(jax.tree.leaves(model), jax.tree.leaves(again), strict=True))
        assert TIDE(model)._mesh == mesh, "an engine runs where its model lies"
    assert len(given) == len(routes) * len(plain)
    assert {kind for _, kind in given} == {np.ndarray}
    assert tide_jax.model.files.checkpoint.fingerprint(model) == tide_jax.model.files.checkpoint.fingerprint(
        tide_jax.load(folder / "source")
    )


def all_that_an_engine_does() -> None:
    """Beside tokens: a monitor, sampling, rows that do not divide, a second call."""
    split = engine_of("even", "2x2")
    options: dict[str, Any] = {"max_new_tokens": 5, "temperature": 0.8, "key": jax.random.key(3)}
    wanted = engine_of("even").generate(PROMPTS[:3], mode="exit", **options)
    for _ in range(2):
        found = split.generate(PROMPTS[:3], mode="exit", monitor=DriftMonitor(1.0), **options)
        np.testing.assert_array_equal(found.tokens, wanted.tokens)
        assert found.stats.drift.audited == 3
    assert found.stats.compile_time == 0


def calibration_splits_the_model(folder: Path) -> None:
    """Routers from a model that is split."""
    from tide_jax.testing import ByteTokenizer

    config = tide_jax.CalibrationConfig(
        checkpoint_interval=1, router_bottleneck_dim=4, min_layers=1, max_length=16, exit_head_steps=2
    )
    texts = [f"text number {n} of some" for n in range(200)]
    mesh = tide_jax.make_mesh("2x4")
    routers = tide_jax.calibrate(tiny_model(EVEN), ByteTokenizer(), texts, config=config, mesh=mesh)
    assert routers.exit_points == (0,)


def checks(folder: Path) -> dict[str, Callable[[], None]]:
    """Every check by name."""
    cases = {
        f"{name} on {shape}": functools.partial(same, name, shape, modes) for (name, shape), modes in CASES.items()
    }
    plain = (
        leaves_differ,
        weights_are_split,
        integers_are_split,
        uneven_axes_stay_whole,
        cache_is_split,
        results_take_the_place_of_what_is_donated,
        two_sums_a_layer,
        all_that_an_engine_does,
    )
    with_folder = (loading_splits, calibration_splits_the_model)
    cases |= {check.__name__: check for check in plain}
    return cases | {check.__name__: functools.partial(check, folder) for check in with_folder}


def outcome(check: Callable[[], None]) -> str:
    """ "ok", or how it failed."""
    try:
        check()
    except Exception:
        return traceback.format_exc()
    return "ok"


def one_of_two(folder: Path, port: str, number: str) -> None:
    """A command and an engine over two processes; the first prints what the command does."""
    where = ["--distributed", "--coordinator", f"localhost:{port}", "--processes", "2", "--process-id", number]
    command = ["generate", str(folder / "converted"), "--prompt", "the cat", "--max-new-tokens", "4", "--mesh", "2x4"]
    code = tide_jax.cli.main.main([*command, *where])
    assert code == 0, code
    assert (jax.process_count(), jax.device_count()) == (2, 8)
    engine = engine_of("even", "2x4")
    engine._learned._costs.clear()  # measured by each, agreed on by both
    assert not engine.model.embed.kernel[...].is_fully_addressable
    for mode in ("lossless", "score"):
        for found, wanted in zip(run(engine, mode), alone("even", mode), strict=True):
            np.testing.assert_allclose(found, wanted, atol=1e-4 if wanted.dtype == np.float32 else 0, err_msg=mode)
    with pytest.raises(tide_jax.TideError, match="take all of them"):
        tide_jax.make_mesh("1x4")


if __name__ == "__main__":
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_numpy_rank_promotion", "raise")
    what, folder, *rest = sys.argv[1:]
    if what == "process":
        one_of_two(Path(folder), *rest)
    else:
        print(json.dumps({name: outcome(check) for name, check in checks(Path(folder)).items()}))
