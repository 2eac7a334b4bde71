"""The decoder: embedding, layers, head, and the plain full-depth forward pass, the reference for everything else."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PRNGKeyArray

from tide_jax.errors import TideError, join_problems
from tide_jax.model.architecture import DecoderConfig
from tide_jax.model.attention.grouped import attention_context
from tide_jax.model.cache import KVCache
from tide_jax.model.fingerprints import Samples
from tide_jax.model.layers import Context, DecoderLayer
from tide_jax.model.memory import New
from tide_jax.model.norms import block_norm
from tide_jax.model.ops import Dense, from_storage_order, times_rows, to_storage_order
from tide_jax.model.recurrent.order import TokenOrder
from tide_jax.model.rounding import (
    Weights,
    as_floats,
    as_int8,
    axes_of,
    precision,
    round_weights,
    scale_path,
)
from tide_jax.model.sharding import place, whole_channels
from tide_jax.model.tables import Embedding, Head, HeadLayer, HeadRows


class Decoder(nnx.Module):
    """A decoder-only language model with the architecture in `config`.

    The module is a JAX pytree; pass it to jitted functions directly.

    Args:
      config: the architecture, kept as `.config`.
      dtype: dtype of all parameters and activations. Norms, softmax, rotary angles and logits are computed in float32.
      rngs: source of the random initial weights.

    Attributes:
      float_fingerprint: for a model whose weights were rounded to 8 bits, the fingerprint of the float model, if it is
        known (`tide_jax.model.files.checkpoint.fingerprint`).
    """

    def __init__(self, config: DecoderConfig, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs) -> None:
        self.config = config
        self.float_fingerprint: str | None = None
        d, e, late = config.hidden_size, config.embedding_size, config.project_after_norm
        width = e if e is not None and late else d

        def table(rows: int, size: int) -> Embedding | None:
            return Embedding(rows, size, dtype=dtype, rngs=rngs) if rows else None

        rows, tied = config.vocab_size + config.extra_tokens, config.tie_embeddings
        self.embed = Embedding(rows, e or d, head=tied, dtype=dtype, rngs=rngs)
        self.project_in = None if e is None else Dense((e,), (d,), bias=late, dtype=dtype, rngs=rngs)
        self.added = table(config.added_embeddings, width)
        self.positions = table(config.learned_positions if config.positions == "learned" else 0, width)
        self.embedding_norm = block_norm(config, width, dtype=dtype) if config.embedding_norm else None
        self.layers = nnx.List([DecoderLayer(config, i, dtype=dtype, rngs=rngs) for i in range(config.num_layers)])
        self.final_norm = block_norm(config, d, dtype=dtype) if config.final_norm else _Identity()
        transform = config.head_transform
        narrow = e is not None and transform is None
        self.project_out = Dense((d,), (e or d,), bias=False, dtype=dtype, rngs=rngs) if narrow else None
        self.head_transform = None if transform is None else HeadLayer(config, transform, dtype=dtype, rngs=rngs)
        self.head = Head(config, dtype=dtype, rngs=rngs)

    @property
    def dtype(self) -> jnp.dtype:
        """dtype of the activations, of the cache, and of all parameters that are not 8-bit integers."""
        return self.embed.dtype

    @property
    def weights(self) -> Weights:
        """How the matrices are stored: "float" or "int8"."""
        table = self.embed if self.config.tie_embeddings else self.head
        return "float" if table.scale is None else "int8"

    @property
    def precision(self) -> str:
        """The number format of the computation: the dtype, and whether weights are integers."""
        return precision(self.dtype, self.weights)

    def __call__(self, tokens: Int[Array, "B T"], positions: Int[Array, "B T"] | None = None) -> Float[Array, "B T V"]:
        """Logits of every token at full depth, float32, without a cache.

        Args:
          tokens: token ids.
          positions: position of each token in its row, -1 for padding; 0, 1, 2... if omitted.
        """
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32)[None], tokens.shape)
        x, _ = self.run_layers(tokens, positions, None)
        return self.logits(self.final_norm(x))

    def run_layers(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        cache: KVCache | None,
        *,
        advances: bool = False,
    ) -> tuple[Float[Array, "B T D"], tuple[New, ...]]:
        """Plain pass through all layers: the last layer's output, and what each layer keeps of the tokens.

        Args:
          advances: recurrent layers return the state after the tokens instead of the tokens' inputs.
        """
        outputs = list(self.layer_outputs(tokens, positions, cache, advances=advances))
        return outputs[-1][0], tuple(new for _, new in outputs)

    def layer_outputs(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        cache: KVCache | None,
        *,
        advances: bool = False,
    ) -> Iterator[tuple[Float[Array, "B T D"], New]]:
        """The residual stream after each layer, and what the layer keeps of the tokens, in order."""
        x, contexts = self.embed_tokens(tokens, positions), self.contexts(positions, cache)
        for i, layer in enumerate(self.layers):
            x, new = layer(x, contexts, cache.layer(i) if cache is not None else None, advances=advances)
            yield self.residual(x), new

    def embed_tokens(self, tokens: Int[Array, "B T"], positions: Int[Array, "B T"]) -> Float[Array, "B T S"]:
        """What the first layer reads: embeddings of tokens and, if any, of absolute positions.

        In architectures whose residual stream carries something (`DecoderConfig.carried`), that follows.
        """
        x, carried = self._embed(tokens, positions), self.config.carried
        if carried != "nothing":
            x = jnp.concatenate([x, x if carried == "embedding" else jnp.zeros_like(x)], axis=-1)
        return whole_channels(x)

    def residual(self, stream: Float[Array, "*any S"]) -> Float[Array, "*any D"]:
        """The residual stream without what it carries: what norms, heads, routers and translators read."""
        return stream[..., : self.config.hidden_size]

    def _embed(self, tokens: Int[Array, "B T"], positions: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        config, x = self.config, self.embed(tokens)
        if config.embedding_scale is not None:
            x = x * jnp.asarray(config.embedding_scale, x.dtype)
        if self.project_in is not None and not config.project_after_norm:
            x = self.project_in(x)
        if self.added is not None:
            x = x + jnp.sum(self.added.kernel[...], axis=0)[None, None, :]
        if not config.positions_after_norm:
            x = self._add_positions(x, positions)
        if self.embedding_norm is not None:
            x = self.embedding_norm(x)
        if config.positions_after_norm:
            x = self._add_positions(x, positions)
        return self.project_in(x) if self.project_in is not None and config.project_after_norm else x

    def _add_positions(self, x: Float[Array, "B T E"], positions: Int[Array, "B T"]) -> Float[Array, "B T E"]:
        """Adds the learned or sinusoidal vector of each position, if the architecture has one."""
        index = jnp.maximum(positions, 0) + jnp.int32(self.config.position_offset)
        if self.positions is not None:
            return x + self.positions(index)
        if self.config.positions == "sinusoidal":
            return x + _sinusoid(index, x.shape[-1], endpoint=self.config.sinusoid_endpoint).astype(x.dtype)
        return x

    def contexts(self, positions: Int[Array, "B T"], cache: KVCache | None) -> tuple[Context, ...]:
        """Masks and rotary tables of each attention type, and the order of tokens for each recurrent type.

        They are computed once and shared by all layers.

        Args:
          positions: positions of the new tokens.
          cache: earlier tokens.
        """
        seq_len, slots = jnp.max(positions) + 1, None if cache is None else cache.positions
        attention = [attention_context(kind, positions, seq_len, slots) for kind in self.config.attention_types]
        recurrent = len(self.config.recurrent_types)
        return (*attention, *[TokenOrder.of(positions >= 0)] * recurrent) if recurrent else tuple(attention)

    def logits(self, x: Float[Array, "B T D"], rows: HeadRows | None = None) -> Float[Array, "B T V"]:
        """Logits, float32, from states after the final norm; with `rows`, only for that part of the vocabulary."""
        if self.head_transform is not None:
            x = self.head_transform(x)
        elif self.project_out is not None:
            x = self.project_out(x)
        rows = self._head_rows() if rows is None else rows
        out = times_rows(x, rows.kernel, rows.scale).astype(jnp.float32)
        if rows.bias is not None:
            out = out + rows.bias.astype(jnp.float32)[None, None, :]
        if self.config.logit_scale != 1.0:
            out = out * self.config.logit_scale
        if (cap := self.config.logit_softcap) is not None:
            out = cap * jnp.tanh(out / cap)
        return out

    def head_rows(self, ids: Int[Array, " K"]) -> HeadRows:
        """The output projection's rows for some token ids, for `logits`."""
        return jax.tree.map(lambda a: jnp.take(a, ids, axis=0, mode="clip"), self._head_rows())

    def _head_rows(self) -> HeadRows:
        kernel, scale = self.head.kernel, self.head.scale
        if kernel is None:
            kernel, scale = self.embed.kernel, self.embed.scale
        bias = self.head.bias
        return HeadRows(kernel[...], None if bias is None else bias[...], None if scale is None else scale[...])


class _Identity(nnx.Module):
    """Stands in for the final norm in architectures without one."""

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return x


def _sinusoid(index: Int[Array, "B T"], size: int, *, endpoint: bool) -> Float[Array, "B T D"]:
    """Sines, then cosines, of geometrically spaced frequencies (Vaswani et al. 2017, arXiv:1706.03762, section 3.5)."""
    half = size // 2
    steps = half - 1 if endpoint else size / 2
    frequencies = np.exp(np.arange(half, dtype=np.float32) * np.float32(-math.log(10000.0) / steps))
    angles = index.astype(jnp.float32)[:, :, None] * jnp.asarray(frequencies)[None, None, :]
    waves = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
    return jnp.pad(waves, ((0, 0), (0, 0), (0, size - 2 * half)))


class _Kind(NamedTuple):
    """Properties of a parameter besides its values: its known and stored shapes, and the axes with a role."""

    known: tuple[int, ...]
    kept: tuple[int, ...]
    inputs: int | None
    summed: tuple[int, ...] | None


@functools.lru_cache(maxsize=8)
def _kinds(config: DecoderConfig) -> dict[str, _Kind]:
    """Properties of every parameter by its dotted path, without allocating any.

    Cached, because tracing the modules takes a quarter of a second for 30 layers and one load calls this several times.
    """
    leaves = nnx.to_flat_state(nnx.state(_abstract(config)))
    return {
        _dotted_path(path): _Kind(_known_shape(leaf), tuple(leaf.get_value().shape), _input_axes(leaf), axes_of(leaf))
        for path, leaf in leaves
    }


def abstract_parameters(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter by its dotted path (``layers.0.attention.q.kernel``), without allocating any."""
    return {path: kind.known for path, kind in _kinds(config).items()}


def stored_shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Shape in which the model stores every parameter, by its dotted path."""
    return {path: kind.kept for path, kind in _kinds(config).items()}


def kernel_input_axes(config: DecoderConfig) -> dict[str, int]:
    """Number of input axes, by path, of the parameters that the model stores as ``outputs + inputs``."""
    return {path: kind.inputs for path, kind in _kinds(config).items() if kind.inputs is not None}


def summed_axes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Axes of the stored shape that products sum over, by path, for the parameters that may be 8-bit integers."""
    return {path: kind.summed for path, kind in _kinds(config).items() if kind.summed is not None}


class StoredParameter(NamedTuple):
    """A parameter as the model stores it; the scales of 8-bit integers are a parameter of their own.

    Attributes:
      path: its dotted path.
      value: the array itself, not a copy.
      input_axes: number of trailing axes of `value` that come first in its known shape; 0 if both shapes are the same.
    """

    path: str
    value: Array
    input_axes: int


def stored_parameters(model: Decoder) -> list[StoredParameter]:
    """Every parameter of a model, sorted by path, without copies."""
    leaves = {_dotted_path(path): leaf for path, leaf in nnx.to_flat_state(nnx.state(model))}
    return [StoredParameter(p, leaves[p].get_value(), _input_axes(leaves[p]) or 0) for p in sorted(leaves)]


def parameters(model: Decoder) -> dict[str, Array]:
    """Every parameter of a model by its dotted path; kernels are copied to ``inputs + outputs``.

    8-bit integers are returned as the float32 weights that they represent.
    """
    leaves = {_dotted_path(path): leaf for path, leaf in nnx.to_flat_state(nnx.state(model))}
    scales = {path: leaves.get(scale_path(path)) for path in leaves if axes_of(leaves[path]) is not None}
    apart = {scale_path(path) for path, scale in scales.items() if scale is not None}
    found: dict[str, Array] = {}
    for path in sorted(leaves.keys() - apart):
        leaf, scale = leaves[path], scales.get(path)
        value = leaf.get_value() if scale is None else as_floats(leaf, scale, jnp.dtype(jnp.float32))
        found[path] = from_storage_order(value, axes) if (axes := _input_axes(leaf)) else value
    return found


def from_parameters(
    config: DecoderConfig,
    tensors: Iterable[tuple[str, np.ndarray | Array]],
    *,
    dtype: DTypeLike,
    mesh: Mesh | None = None,
    stored: bool = False,
    weights: Weights = "float",
    own_scales: Callable[[str], np.ndarray | None] = lambda path: None,
) -> Decoder:
    """Builds a model from ``(path, tensor)`` pairs; casts to `dtype` or rounds one tensor at a time.

    A numpy array of `dtype` becomes part of the model without a copy if its memory allows. Such an array must not be
    changed afterwards.

    Args:
      stored: the tensors have the shapes that the model stores (`StoredParameter`), not their known shapes.
      mesh: the devices to put the model on, see `tide_jax.load`.
      weights: "int8" rounds every tensor that may be rounded (`summed_axes`). Tensors that already are 8-bit integers
        come with their scales (`tide_jax.model.rounding.scale_path`) and in the stored shape.
      own_scales: by path, the scales from which a parameter's floats were made, as `round_weights` takes them.

    Raises:
      TideError: paths are unknown or missing, or have a wrong shape; the message has the first of them and their
        number.
    """
    graph, state = nnx.split(_abstract(config, dtype, weights))
    leaves = {_dotted_path(path): leaf for path, leaf in nnx.to_flat_state(state)}
    filled: dict[str, Array] = {}
    problems: list[str] = []
    samples = _samples(config) if weights == "int8" else None
    for path, tensor in tensors:
        if path not in leaves:
            problems.append(f"unknown parameter {path}")
        elif (shape := tuple(leaves[path].shape) if stored else _known_shape(leaves[path])) != tensor.shape:
            problems.append(f"{path} has shape {tensor.shape}, expected {shape}")
        else:
            axes = None if stored else _input_axes(leaves[path])
            value = tensor if axes is None else to_storage_order(tensor, axes)
            # The fingerprint is that of the floats, so sample them before they are rounded.
            if samples is not None and value.dtype != np.int8 and path in samples.paths:
                samples.take(path, (), np.asarray(value))
            for name, part in _round(path, leaves[path], value, own_scales):
                filled[name] = _place(name, part, leaves[name].get_value().dtype, mesh)
    problems += [f"missing parameter {path}" for path in leaves if path not in filled]
    if problems:
        raise TideError(f"the tensors do not fit the model configuration: {join_problems(sorted(problems))}")
    state = jax.tree_util.tree_map_with_path(lambda path, _: filled[_tree_path(path)], state)
    model = nnx.merge(graph, state)
    model.float_fingerprint = None if samples is None else samples.digest(config)
    return model


def _round(
    path: str, leaf: nnx.Variable, value: np.ndarray | Array, own_scales: Callable[[str], np.ndarray | None]
) -> list[tuple[str, np.ndarray | Array]]:
    """The stored form of a tensor by path: the tensor itself, or its integers and their scales."""
    if leaf.get_value().dtype != jnp.int8 or value.dtype == jnp.int8:
        return [(path, value)]
    integers, scale = round_weights(np.asarray(value), axes_of(leaf) or (), own_scales(path))
    return [(path, integers), (scale_path(path), scale)]


def _samples(config: DecoderConfig) -> Samples:
    return Samples(stored_shapes(config), kernel_input_axes(config))


class _OneKey(NamedTuple):
    """Replaces `nnx.Rngs` where no number is drawn; the counters of `Rngs` take longer to trace than all modules."""

    key: PRNGKeyArray

    def params(self) -> PRNGKeyArray:
        return self.key


def _abstract(config: DecoderConfig, dtype: DTypeLike = jnp.float32, weights: Weights = "float") -> Decoder:
    """The model's structure with shapes but no values."""

    def make() -> Decoder:
        model = Decoder(config, dtype=dtype, rngs=cast(nnx.Rngs, _OneKey(jax.random.key(0))))
        return as_int8(model) if weights == "int8" else model

    return nnx.eval_shape(make)


def _input_axes(leaf: nnx.Variable) -> int | None:
    """Number of input axes of a `Dense` kernel; None for other parameters."""
    return leaf.get_metadata().get("input_axes")


def _known_shape(leaf: nnx.Variable) -> tuple[int, ...]:
    shape, axes = tuple(leaf.get_value().shape), _input_axes(leaf)
    return shape if axes is None else shape[len(shape) - axes :] + shape[: len(shape) - axes]


def _place(path: str, tensor: np.ndarray | Array, dtype: DTypeLike, mesh: Mesh | None) -> Array:
    if mesh is None:
        same = isinstance(tensor, np.ndarray) and tensor.dtype == dtype
        return jax.device_put(tensor, may_alias=True) if same else jnp.asarray(tensor, dtype)
    # A numpy array is cast on the host, so no device has to hold all of it.
    return place(path, tensor if tensor.dtype == dtype else tensor.astype(dtype), mesh)


def _dotted_path(path: tuple) -> str:
    return ".".join(str(part) for part in path)


def _tree_path(path: tuple) -> str:
    return ".".join(str(k.key) for k in path if isinstance(k, jax.tree_util.DictKey))
