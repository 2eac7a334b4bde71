"""Programs of an 8B model, lowered for absent devices; weights are only shapes."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, SingleDeviceSharding

import pallas_kernels.selection
from tide_jax.exits.exits import Exits
from tide_jax.functional import (
    Decoder,
    DecoderConfig,
    Prompt,
    Request,
    decode_step,
    generate_tokens,
    init_cache,
    make_sampling,
    prefill,
)
from tide_jax.lossless.control import DraftControl, PassCosts, verify_widths
from tide_jax.lossless.speculate import MOST_SLOTS, TEXT_ONLY, advance_lossless, begin_lossless
from tide_jax.model.architecture import AttentionType, LatentConfig, MoEConfig, RopeConfig
from tide_jax.model.recurrent.types import GatedDeltaType, ShortConvType, StateSpaceType
from tide_jax.model.rounding import Weights, as_int8
from tide_jax.model.sharding import DATA, MODEL, array_sharding, mesh_context
from tide_jax.testing import constant_routers

SLOTS = 4096
PROMPT, LONG_PROMPT = 16, 2048
DTYPE = jnp.bfloat16
INTERVAL = 4
_EXPERTS = 16  # of 896 channels: as many weights as the MLP they replace
_LOWERED_FOR = {"gpu": "cuda", "tpu": "tpu"}
Program = Literal["decode_step", "generate_tokens", "prefill", "advance_lossless"]


class Case(NamedTuple):
    """A program to compile.

    Attributes:
      name: name in the table.
      kv_strategy: None runs every layer, without routers.
      implementation: implementation of the exit step.
      rows: batch size.
      weights: the model's kind of weights.
      kind: "experts" replaces the MLPs by mixtures of experts, "latent" stores keys and values as latent vectors,
        "states" replaces three of four layers' attention by a delta net, Mamba-2 and a short convolution.
      program: one step; a whole generation, which makes its own cache; a prompt of `LONG_PROMPT` tokens; or one pass of
        the lossless mode, which verifies up to seven drafts.
      slots: capacity of the cache, for each row.
      deferred: "propagate" projects rows of skipped layers for several tokens at once.
      graphs: on a GPU, loops as CUDA graphs (`tide_jax.generation.cuda_graphs`).
      mesh: shape of the mesh, data x model.
      copies: whether copies are reported but no problem, because they are known (docs/scaling.md, "Limits").
    """

    name: str
    kv_strategy: Any = None
    implementation: str | None = "reference"
    rows: int = 1
    weights: Weights = "float"
    kind: Literal["plain", "experts", "latent", "states"] = "plain"
    program: Program = "decode_step"
    slots: int = SLOTS
    deferred: bool = False
    graphs: bool = False
    mesh: tuple[int, int] = (1, 1)
    copies: bool = False

    @property
    def makes_cache(self) -> bool:
        """Whether the program makes its own cache."""
        return self.program == "generate_tokens"

    def config(self, config: DecoderConfig) -> DecoderConfig:
        """The model's configuration, from that of a plain model."""
        kinds = {"plain": _plain, "experts": _with_experts, "latent": _with_latent_vectors, "states": _with_states}
        return kinds[self.kind](config)


class Lowered(NamedTuple):
    """A lowered program, and the numbers of elements of its model's matrices of floats and of integers.

    On a mesh these are the numbers on one device.
    """

    program: jax.stages.Lowered
    floats: set[int]
    integers: set[int]


def lower(case: Case, config: DecoderConfig, devices: np.ndarray) -> Lowered:
    """Lowers a case for absent devices, an array of the mesh's shape."""
    mesh = None if devices.size == 1 else Mesh(devices, (DATA, MODEL), axis_types=(AxisType.Auto,) * 2)

    def there(make: Callable[[], Any]) -> Any:
        def put(path: Any, leaf: Any) -> Any:
            on = SingleDeviceSharding(devices.flat[0]) if mesh is None else array_sharding(path, leaf.shape, mesh)
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=on)

        return jax.tree_util.tree_map_with_path(put, jax.eval_shape(make))

    with mesh_context(mesh), _compiling_for(devices):
        model = there(functools.partial(_model, config, case.weights))
        exits = None if case.kv_strategy is None else there(functools.partial(_exits, config, case))
        traced = _TRACED[case.program](case, config, model, exits, there)
        program = traced.lower(lowering_platforms=(_LOWERED_FOR[_platform(devices)],))
    numbers: dict[bool, set[int]] = {False: set(), True: set()}
    for leaf in jax.tree.leaves(model):
        if len(leaf.shape) > 1:
            numbers[leaf.dtype == jnp.int8].add(math.prod(leaf.sharding.shard_shape(leaf.shape)))
    return Lowered(program, numbers[False], numbers[True])


There = Callable[[Callable[[], Any]], Any]
"""Shapes of what a function makes, on the absent devices."""


def _decode_step(case: Case, config: DecoderConfig, model: Any, exits: Any, there: There) -> Any:
    cache = there(lambda: init_cache(config, case.rows, case.slots, DTYPE, exits=exits))
    rows = there(lambda: (*(jnp.zeros((case.rows,), jnp.int32) for _ in range(2)), jnp.ones((case.rows,), bool)))
    return jax.jit(decode_step, donate_argnames="cache").trace(model, cache, *rows, exits)


def _generate_tokens(case: Case, config: DecoderConfig, model: Any, exits: Any, there: There) -> Any:
    program = jax.jit(generate_tokens, static_argnames="capacity")
    return program.trace(model, *there(lambda: _call(case)), exits, capacity=case.slots - PROMPT)


def _prefill(case: Case, config: DecoderConfig, model: Any, exits: Any, there: There) -> Any:
    cache = there(lambda: init_cache(config, case.rows, case.slots, DTYPE, exits=exits))
    prompt = there(lambda: _prompt(case.rows, LONG_PROMPT))
    return jax.jit(prefill, donate_argnames="cache").trace(model, prompt, cache, exits)


def _advance_lossless(case: Case, config: DecoderConfig, model: Any, exits: Any, there: There) -> Any:
    prompt, request = there(lambda: _call(case))
    costs = there(lambda: PassCosts(jnp.ones((len(verify_widths(MOST_SLOTS)),)), jnp.zeros((1,)), jnp.float32(0)))
    control = there(lambda: DraftControl.start(TEXT_ONLY))
    begin = functools.partial(begin_lossless, capacity=case.slots - PROMPT)
    state = there(lambda: begin(_zeros(model), _zeros(prompt), _zeros(request), _zeros(control)))
    program = jax.jit(advance_lossless, static_argnums=1, donate_argnums=2)
    return program.trace(model, TEXT_ONLY, state, request, costs)


_TRACED: dict[str, Callable[..., Any]] = {
    "decode_step": _decode_step,
    "generate_tokens": _generate_tokens,
    "prefill": _prefill,
    "advance_lossless": _advance_lossless,
}


def _zeros(tree: Any) -> Any:
    """Arrays of the same shapes, to trace with."""

    def zero(leaf: Any) -> jax.Array:
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.key(0)
        return jnp.zeros(leaf.shape, leaf.dtype)

    return jax.tree.map(zero, tree)


def _prompt(rows: int, tokens: int) -> Prompt:
    return Prompt(jnp.zeros((rows, tokens), jnp.int32), jnp.full((rows,), tokens, jnp.int32))


def _call(case: Case) -> tuple[Prompt, Request]:
    """Prompts and a request for sampled tokens."""
    eos, most = jnp.full((case.rows, 1), -1, jnp.int32), jnp.int32(case.slots - PROMPT)
    return _prompt(case.rows, PROMPT), Request(make_sampling(), jax.random.key(0), eos, jnp.int32(0), most)


def _model(config: DecoderConfig, weights: Weights) -> Decoder:
    model = Decoder(config, dtype=DTYPE, rngs=nnx.Rngs(0))
    return as_int8(model) if weights == "int8" else model


def _exits(config: DecoderConfig, case: Case) -> Exits:
    routers = constant_routers(config, interval=INTERVAL, bottleneck=128)
    return Exits.uniform(
        routers, 0.0, kv_strategy=case.kv_strategy, deferred=case.deferred, implementation=case.implementation
    )


def _plain(config: DecoderConfig) -> DecoderConfig:
    return config


def _with_latent_vectors(config: DecoderConfig) -> DecoderConfig:
    """The configuration with the sizes of DeepSeek-V2's attention."""
    latent = LatentConfig(kv_rank=512, q_rank=None, nope_dim=128, rope_dim=64, value_dim=128)
    rope = RopeConfig(theta=10000.0, rotary_dim=64, interleaved=True)
    head_dim = latent.nope_dim + latent.rope_dim
    kinds = (AttentionType(scale=head_dim**-0.5, rope=rope),)
    return dataclasses.replace(
        config, latent=latent, head_dim=head_dim, num_kv_heads=config.num_heads, attention_types=kinds
    )


def _with_experts(config: DecoderConfig) -> DecoderConfig:
    size = config.intermediate_size // _EXPERTS
    moe = MoEConfig(num_experts=_EXPERTS, experts_per_token=2, intermediate_size=size)
    return dataclasses.replace(config, moe=moe)


def _with_states(config: DecoderConfig) -> DecoderConfig:
    """The configuration with recurrent layers of the sizes that hybrids of 8B parameters have."""
    kinds = (
        GatedDeltaType(key_heads=16, value_heads=32, key_dim=128, value_dim=128, width=4),
        StateSpaceType(heads=128, head_dim=64, groups=8, state_size=128, width=4),
        ShortConvType(width=3),
    )
    pattern = tuple((i + 1) % 4 for i in range(config.num_layers))
    return dataclasses.replace(config, recurrent_types=kinds, layer_pattern=pattern)


def _platform(devices: np.ndarray) -> str:
    return "tpu" if devices.flat[0].platform == "tpu" else "gpu"


@contextlib.contextmanager
def _compiling_for(devices: np.ndarray) -> Iterator[None]:
    """Makes JAX choose kernels, and from JAX 0.11 on build them, for the absent devices."""
    here, pallas_kernels.selection.platform = pallas_kernels.selection.platform, lambda: _platform(devices)
    mesh = Mesh(devices.reshape(-1)[:1], ("x",), axis_types=(AxisType.Auto,)).abstract_mesh
    asks = hasattr(jax.sharding, "AbstractDevice") and devices.size == 1
    try:
        with jax.sharding.use_abstract_mesh(mesh) if asks else contextlib.nullcontext():
            yield
    finally:
        pallas_kernels.selection.platform = here
