"""Places models, routers and caches on a mesh of devices, by rules on logical axes.

A mesh has two axes. "data" splits rows; "model" splits the weights within a group of devices (tensor parallelism as in
Megatron-LM, Shoeybi et al. 2019, arXiv:1909.08053: one sum over the group after attention, one after the feed-forward
block). `PARAMETERS` and `CACHE` name the axes of tensors, `RULES` maps each name to a mesh axis, and XLA's partitioner
derives the rest. The model's code is the same with and without a mesh.
"""

from __future__ import annotations

import contextlib
import fnmatch
import re
from collections.abc import Mapping
from contextlib import AbstractContextManager
from types import EllipsisType
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from tide_jax.errors import TideError

T = TypeVar("T")
Axes = tuple[str | None, ...]
Rule = tuple[str | EllipsisType | None, ...]
"""The logical axes of a tensor; an ellipsis at the end stands for any number of axes that stay whole."""

DATA, MODEL = "data", "model"

RULES: Mapping[str, str | None] = {
    "rows": DATA,
    "heads": MODEL,
    "kv_heads": MODEL,
    "ffn": MODEL,
    "vocab": MODEL,
    "exit_rank": MODEL,
    # Each expert is split by "ffn", so a step that needs a few experts loads all devices equally and moves no weights.
    "experts": None,
}
"""Mesh axis of each logical axis; a tensor's axis stays whole if the mesh does not divide it evenly."""

PARAMETERS: Mapping[str, Rule] = {
    "*.embed.kernel": ("vocab", None),
    "*.head.kernel": ("vocab", None),
    "*.head.bias": ("vocab",),
    "*.attention.q.kernel": ("heads", None, None),
    "*.attention.q.bias": ("heads", None),
    "*.attention.kv.kernel": ("kv_heads", None, None, None),
    "*.attention.kv.bias": ("kv_heads", None, None),
    "*.attention.value.kernel": ("kv_heads", None, None),
    "*.attention.value.bias": ("kv_heads", None),
    "*.attention.value_bias": ("kv_heads", None),
    "*.attention.out.kernel": (None, "heads", None),
    "*.attention.gate.kernel": ("heads", None, None),
    "*.attention.gate_bias": ("heads", None),
    "*.attention.sinks": ("heads",),
    "*.attention.k_up.kernel": ("heads", None, None),
    "*.attention.v_up.kernel": ("heads", None, None),
    "*.attention.q": ("experts", None, "kv_heads", None),
    "*.attention.out": ("experts", "kv_heads", None, None),
    "*.attention.q_scale": ("experts", "kv_heads", None),
    "*.recurrent.q.kernel": ("heads", None, None),
    # RWKV's keys and values, and RG-LRU's gate, have channels without heads.
    "*.recurrent.k.kernel": ("heads", ...),
    "*.recurrent.v.kernel": ("heads", ...),
    "*.recurrent.qkv.kernel": ("heads", None, None, None),
    "*.recurrent.fades.kernel": ("heads", None, None),
    "*.recurrent.gates": (None, "heads", None, None),
    "*.recurrent.output_gate.kernel": ("heads", ...),
    "*.recurrent.inputs.kernel": (None, "ffn", None),
    "*.recurrent.stream_gate.kernel": (None, "ffn", None),
    "*.recurrent.stream.kernel": ("ffn", None),
    "*.recurrent.gate.kernel": ("ffn", None),
    "*.recurrent.parts.kernel": (None, "ffn"),
    "*.recurrent.step.kernel": ("ffn", None),
    "*.recurrent.out.kernel": (None, "ffn", ...),
    "*.mlp.gate.kernel": ("ffn", None),
    "*.gate_up.kernel": (None, "ffn", None),
    "*.gate_up.bias": (None, "ffn"),
    "*.up.kernel": ("ffn", None),
    "*.up.bias": ("ffn",),
    "*.down.kernel": (None, "ffn"),
    "*.experts.gate_up": ("experts", None, None, "ffn"),
    "*.experts.gate_up_bias": ("experts", None, "ffn"),
    "*.experts.gate_up_scale": ("experts", None, "ffn"),
    "*.experts.down": ("experts", "ffn", None),
    "*.heads.*.factors.0": (None, "exit_rank"),
    "*.heads.*.factors.1": ("exit_rank", None),
    "*.candidates.rows.kernel": ("vocab", None),
    "*.candidates.rows.bias": ("vocab",),
}
"""Logical axes of stored parameters, by dotted path; the first matching pattern applies.

All other parameters lie on every device. Most are small: norms, routers and low-rank bottlenecks, and in recurrent
layers filters, biases, fades, shares of the token before, and gates and rates with one number for each head.
Translators are not, but each skipped layer would need a sum over the group, which costs more than reading them. The
scales of a kernel of 8-bit integers are placed like its outputs.
"""

CACHE: Mapping[str, Rule] = {
    "*.keys": ("rows", "kv_heads", None, None),
    "*.values": ("rows", "kv_heads", None, None),
    "*.window": ("rows", None, None),
    "*.matrix": ("rows", "heads", None, None),
    "*.positions": ("rows", None),
}
"""Logical axes of the arrays of a `KVCache`."""


def make_mesh(shape: str | tuple[int, int]) -> Mesh:
    """A mesh for `load`, `shard` and `TIDE`.

    Args:
      shape: ``"DATAxMODEL"`` or ``(data, model)``: splits rows over `data` groups of devices, and the model over the
        `model` devices of each group. Uses the first devices; neighbours form a group.

    Raises:
      TideError: the format is wrong; there are fewer devices; or the mesh covers only a part of the devices of several
        processes.
    """
    data, model = _mesh_shape(shape)
    devices, needed = jax.devices(), data * model
    if needed > len(devices) or (jax.process_count() > 1 and needed != len(devices)):
        found = f"JAX has {len(devices)} ({devices[0].platform}) in {jax.process_count()} process(es)"
        advice = "take all of them" if needed < len(devices) else "take a smaller mesh or start more processes"
        raise TideError(f"mesh={data}x{model} needs {needed} devices, {found}: {advice}")
    return jax.make_mesh((data, model), (DATA, MODEL), axis_types=(AxisType.Auto,) * 2, devices=devices[:needed])


def shard(tree: T, mesh: Mesh) -> T:
    """Moves each tensor of a `Decoder`, `Routers` or a pytree of them to its place; shapes and dtypes stay the same.

    Tensors that are already in place are not copied.

    Raises:
      TideError: `mesh` has no axes "data" and "model".
    """
    mesh = check_mesh(mesh)
    return jax.tree_util.tree_map_with_path(lambda path, leaf: place(_dotted_path(path), leaf, mesh), tree)


def check_mesh(mesh: Any) -> Mesh:
    """A caller's mesh with automatic axes. Raises TideError if it has no axes "data" and "model"."""
    if not isinstance(mesh, Mesh) or not {DATA, MODEL} <= set(mesh.axis_names):
        found = f"axes {mesh.axis_names}" if isinstance(mesh, Mesh) else type(mesh).__name__
        raise TideError(f'mesh has {found}, expected axes "data" and "model": tide_jax.make_mesh("1x4")')
    # Axes of jax.make_mesh may be explicit, which would require a sharding for every intermediate array.
    return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))


def mesh_of(model: Any) -> Mesh | None:
    """The mesh on which `load` or `shard` put a model; None if it is on none."""
    sharding = getattr(next(iter(jax.tree.leaves(model)), None), "sharding", None)
    found = isinstance(sharding, NamedSharding) and {DATA, MODEL} <= set(sharding.mesh.axis_names)
    return sharding.mesh if found else None


def place(path: str, tensor: Any, mesh: Mesh) -> Array:
    """Puts a numpy or JAX parameter on the mesh; each device receives only its own part."""
    return _put(tensor, NamedSharding(mesh, _spec(_parameter_axes(f".{path}", tensor.ndim), tensor.shape, mesh.shape)))


def array_sharding(path: Any, shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    """Where the rules put an array of a model, of routers or of a cache, by its path in a pytree."""
    dotted = f".{_dotted_path(path)}"
    axes = _parameter_axes(dotted, len(shape)) or _axes(dotted, CACHE, len(shape))
    return NamedSharding(mesh, _spec(axes, shape, mesh.shape))


def split_rows(tree: T, mesh: Mesh | None) -> T:
    """Splits the leading axis of arrays over "data" where possible; without a mesh returns them unchanged."""
    if mesh is None:
        return tree
    return jax.tree.map(lambda a: _put(a, NamedSharding(mesh, _spec(("rows",), a.shape, mesh.shape))), tree)


def replicate(tree: T, mesh: Mesh | None) -> T:
    """Copies arrays that are not on the mesh yet to all its devices; without a mesh returns them unchanged."""
    if mesh is None:
        return tree
    devices, everywhere = set(mesh.devices.flat), NamedSharding(mesh, PartitionSpec())

    def put(leaf: Any) -> Array:
        there = isinstance(leaf, jax.Array) and leaf.sharding.device_set == devices
        return leaf if there else _put(leaf, everywhere)

    return jax.tree.map(put, tree)


def mesh_context(mesh: Mesh | None) -> AbstractContextManager[Any]:
    """The context in which programs for a mesh are traced, which `on_mesh` detects; a null context without a mesh."""
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def on_mesh() -> bool:
    """Whether the current trace runs on a mesh with axes "data" and "model", set by ``jax.set_mesh``."""
    mesh = jax.sharding.get_abstract_mesh()
    return {DATA, MODEL} <= set(mesh.axis_names) and all(kind == AxisType.Auto for kind in mesh.axis_types)


def constrain_cache(cache: T) -> T:
    """Inside jit: shards a cache by its rules on the mesh of ``jax.set_mesh``; returns it unchanged without one."""
    if not on_mesh():
        return cache
    sizes = jax.sharding.get_abstract_mesh().shape

    def constrain(path: Any, leaf: Array) -> Array:
        axes = _axes(f".{_dotted_path(path)}", CACHE, leaf.ndim)
        return jax.lax.with_sharding_constraint(leaf, _spec(axes, leaf.shape, sizes))

    return jax.tree_util.tree_map_with_path(constrain, cache)


def whole_channels(x: Float[Array, "... D"]) -> Float[Array, "... D"]:
    """Inside jit: keeps all channels of a residual stream on each device of a group; no change without a mesh.

    Exit heads return it split by channels, and without this it would be gathered before each matrix product.
    """
    if not on_mesh():
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*(PartitionSpec.UNCONSTRAINED,) * (x.ndim - 1), None))


def readable(tree: T) -> T:
    """The tree with arrays that span several processes as whole numpy arrays; all processes must call this."""

    def read(leaf: Any) -> Any:
        if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable or leaf.is_fully_replicated:
            return leaf
        from jax.experimental.multihost_utils import process_allgather

        return process_allgather(leaf, tiled=True)

    return jax.tree.map(read, tree)


def fetch(tree: T) -> T:
    """The tree as numpy arrays, including those that span several processes; all processes must call this."""
    return jax.device_get(readable(tree))


def from_first_process(tree: T) -> T:
    """The first process's values: programs on a mesh need equal values in every process."""
    if jax.process_count() == 1:
        return tree
    from jax.experimental.multihost_utils import broadcast_one_to_all

    return broadcast_one_to_all(tree)


def _mesh_shape(shape: Any) -> tuple[int, int]:
    found = re.fullmatch(r"([1-9]\d{0,5})x([1-9]\d{0,5})", shape) if isinstance(shape, str) else None
    sizes = tuple(map(int, found.groups())) if found else shape
    if not isinstance(sizes, tuple | list) or len(sizes) != 2 or not all(type(n) is int and n > 0 for n in sizes):
        raise TideError(f"mesh={shape!r} must be DATAxMODEL, two whole numbers from 1 on, such as '1x4'")
    return sizes[0], sizes[1]


def _dotted_path(path: Any) -> str:
    """``layers.0.attention.q.kernel``: a parameter's path without the suffix that `nnx.Param` adds."""
    return jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")


def _parameter_axes(path: str, ndim: int) -> Axes:
    """The logical axes of a parameter; scales have the leading axes of their kernel, which are its outputs."""
    if path.endswith(".scale"):
        return _axes(f"{path.removesuffix('.scale')}.kernel", PARAMETERS, ndim)[:ndim]
    return _axes(path, PARAMETERS, ndim)


def _axes(path: str, table: Mapping[str, Rule], ndim: int) -> Axes:
    """The logical axes of the first rule for a path; an ellipsis becomes as many axes as a tensor of `ndim` has."""
    rule = next((axes for pattern, axes in table.items() if fnmatch.fnmatchcase(path, pattern)), ())
    named = tuple(axis for axis in rule if not isinstance(axis, EllipsisType))
    return named if len(named) == len(rule) else (*named, *(None,) * (ndim - len(named)))


def _spec(axes: Axes, shape: tuple[int, ...], sizes: Mapping[str, int]) -> PartitionSpec:
    """Partition of a tensor by the rules; a tensor with fewer axes than its pattern stays whole."""
    if len(axes) > len(shape):
        return PartitionSpec()
    names = [None if axis is None else RULES[axis] for axis in axes]
    return PartitionSpec(*(n if n and size % sizes[n] == 0 else None for n, size in zip(names, shape, strict=False)))


def _put(array: Any, sharding: NamedSharding) -> Array:
    if isinstance(array, jax.Array) and array.sharding.is_equivalent_to(sharding, array.ndim):
        return array
    if sharding.is_fully_addressable or (isinstance(array, jax.Array) and not array.is_fully_addressable):
        return jax.device_put(array, sharding)
    if jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key):
        data, spec = jax.random.key_data(array), PartitionSpec(*sharding.spec)
        data = _put(data, NamedSharding(sharding.mesh, spec))
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(array))
    whole = np.asarray(array)  # every process has the whole array and gives its devices their parts
    return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])
