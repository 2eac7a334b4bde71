"""Mixture-of-experts feed-forward blocks (Mixtral, Jiang et al. 2024, arXiv:2401.04088, and its successors).

A router scores the experts. A selection chooses and weights a few for each token. Every expert then runs once, over all
tokens that chose it.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int, Int8

from tide_jax.model.activations import ACTIVATIONS, gated_activation
from tide_jax.model.architecture import DecoderConfig, MoEConfig
from tide_jax.model.feed_forward import MLP
from tide_jax.model.norms import block_norm
from tide_jax.model.ops import Dense, einsum, integer_sums, matmul, matmul_precision, normal
from tide_jax.model.rounding import apply_scale

_ON_TPU = "md,...df->m...f"


class Experts(nnx.Module):
    """All experts stacked: ``gate_up [E, D, 2, F]``, ``down [E, F, D]`` and their biases ``[E, 2, F]``, ``[E, D]``.

    Without a gate, `gate_up` has one part instead of two. With 8-bit weights, the scales have the shapes of the biases.
    """

    def __init__(self, config: DecoderConfig, moe: MoEConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        e, d, f, parts = moe.num_experts, config.hidden_size, moe.intermediate_size, 2 if moe.gated else 1
        self.gate_up = nnx.Param(normal(rngs, (e, d, parts, f), d, dtype), summed=(1,))
        self.down = nnx.Param(normal(rngs, (e, f, d), f, dtype), summed=(1,))
        self.gate_up_scale: nnx.Param | None = None
        self.down_scale: nnx.Param | None = None
        self.gate_up_bias = nnx.Param(jnp.zeros((e, parts, f), dtype)) if moe.expert_bias else None
        self.down_bias = nnx.Param(jnp.zeros((e, d), dtype)) if moe.expert_bias else None


class MoE(nnx.Module):
    """Sums each token's best experts, weighted by the router, and the shared expert."""

    def __init__(self, config: DecoderConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        assert config.moe is not None
        moe, d = config.moe, config.hidden_size
        self.moe, self.activation, self.limit = moe, config.activation, config.activation_limit
        choices = moe.num_experts + moe.zero_experts
        self.router = Dense((d,), (choices,), bias=moe.router_bias, exact=True, dtype=dtype, rngs=rngs)
        self.correction = nnx.Param(jnp.zeros((choices,), dtype)) if moe.correction != "none" else None
        self.experts = Experts(config, moe, dtype=dtype, rngs=rngs)
        self.shared = MLP(config, size=moe.shared_size, dtype=dtype, rngs=rngs) if moe.shared_size else None
        gate = moe.shared_gate
        self.shared_gate = Dense((d,), (1,), bias=False, exact=True, dtype=dtype, rngs=rngs) if gate else None
        self.output_norm = block_norm(config, d, dtype=dtype) if moe.output_norm else None
        self.output_bias = nnx.Param(jnp.zeros((d,), dtype)) if moe.output_bias else None

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        tokens = x.reshape(-1, x.shape[-1])
        weights, chosen = self._choice(tokens)
        mixed = self._run_routed(tokens, weights, chosen).astype(x.dtype).reshape(x.shape)
        mixed = mixed if self.output_bias is None else mixed + self.output_bias[...][None, None, :]
        mixed = mixed if self.shared is None else mixed + self._run_shared(self.shared, x)
        return mixed if self.output_norm is None else self.output_norm(mixed)

    def _choice(self, tokens: Float[Array, "N D"]) -> tuple[Float[Array, "N K"], Int[Array, "N K"]]:
        logits = router_logits(self.router, tokens)
        if (cap := self.moe.router_softcap) is not None:
            logits = cap * jnp.tanh(logits / cap)
        correction = None if self.correction is None else self.correction[...].astype(jnp.float32)
        return choose_experts(self.moe, logits, correction)

    def _run_shared(self, shared: MLP, x: Array) -> Array:
        out = shared(x)
        out = out if self.shared_gate is None else out * jax.nn.sigmoid(self.shared_gate(x))
        return out if self.moe.shared_scale == 1.0 else out * jnp.asarray(self.moe.shared_scale, out.dtype)

    def _run_routed(
        self, tokens: Float[Array, "N D"], weights: Float[Array, "N K"], chosen: Int[Array, "N K"]
    ) -> Float[Array, "N D"]:
        own: Array | float = 0.0
        if self.moe.zero_experts:
            # An expert behind the last one gives the token itself. It runs as another expert with weight zero.
            zero = chosen >= self.moe.num_experts
            own = tokens.astype(jnp.float32) * jnp.sum(jnp.where(zero, weights, 0.0), axis=1, keepdims=True)
            weights, chosen = jnp.where(zero, 0.0, weights), chosen % self.moe.num_experts
        rows = jnp.broadcast_to(tokens[:, None, :], (*chosen.shape, tokens.shape[-1]))
        if self.moe.scale_input:
            rows = (rows.astype(jnp.float32) * weights[:, :, None]).astype(rows.dtype)
            weights = jnp.ones_like(weights)
        mixed = by_expert(rows, chosen, self._run_experts).astype(jnp.float32)
        return jnp.sum(mixed * weights[:, :, None], axis=1) + own

    def _run_experts(self, rows: Float[Array, "M D"], expert: Int[Array, " M"]) -> Float[Array, "M D"]:
        """Runs row i through expert ``expert[i]``; rows are sorted by expert."""
        experts = self.experts
        hidden = expert_matmul(rows, experts.gate_up[...], expert, _numbers(experts.gate_up_scale))
        if experts.gate_up_bias is not None:
            hidden = hidden + experts.gate_up_bias[...][expert]
        if self.moe.gated:
            hidden = gated_activation(self.activation, hidden[:, 0], hidden[:, 1], self.limit)
        else:
            hidden = ACTIVATIONS[self.activation](hidden[:, 0])
        out = expert_matmul(hidden, experts.down[...], expert, _numbers(experts.down_scale))
        return out if experts.down_bias is None else out + experts.down_bias[...][expert]


def _numbers(parameter: nnx.Param | None) -> Array | None:
    return None if parameter is None else parameter[...]


def by_expert(
    rows: Float[Array, "N K D"],
    chosen: Int[Array, "N K"],
    run: Callable[[Float[Array, "M D"], Int[Array, " M"]], Float[Array, "M F"]],
) -> Float[Array, "N K F"]:
    """Outputs of the chosen experts; `run` gets the rows sorted by expert, one contiguous run for each."""
    # Sort the rows by expert, run them, and restore the order.
    expert = chosen.reshape(-1)
    order = jnp.argsort(expert, stable=True)
    out = run(rows.reshape(-1, rows.shape[-1])[order], expert[order])
    return out[jnp.argsort(order)].reshape(*chosen.shape, -1)


def expert_matmul(
    rows: Float[Array, "M D"],
    kernels: Float[Array, "E D ..."] | Int8[Array, "E D ..."],
    expert: Int[Array, " M"],
    scale: Float[Array, "E ..."] | None = None,
) -> Float[Array, "M ..."]:
    """Row i times ``kernels[expert[i]]``; rows are sorted by expert.

    Args:
      kernels: in the dtype of `rows`, or 8-bit integers.
      scale: float32 factor of each output, for integers.
    """
    if 2 * rows.shape[0] <= kernels.shape[0]:  # a decode step reads only the experts it needs
        sums = lax.platform_dependent(rows, kernels, expert, tpu=_by_row, default=_gather_experts)
    else:
        # For its ragged product, XLA for a TPU would convert all experts to floats.
        blocks_on_tpu = {} if scale is None else {"tpu": _integers_by_blocks}
        sums = lax.platform_dependent(rows, kernels, expert, cpu=_by_blocks, default=_by_runs, **blocks_on_tpu)
    return sums if scale is None else apply_scale(sums, scale[expert], rows.dtype)


def _gather_experts(
    rows: Float[Array, "M D"], kernels: Float[Array, "E D ..."] | Int8[Array, "E D ..."], expert: Int[Array, " M"]
) -> Float[Array, "M ..."]:
    times = integer_sums if kernels.dtype == jnp.int8 else einsum
    return times("md,md...->m...", rows, kernels[expert])


def _by_row(
    rows: Float[Array, "M D"], kernels: Float[Array, "E D ..."] | Int8[Array, "E D ..."], expert: Int[Array, " M"]
) -> Float[Array, "M ..."]:
    """Variant of `_gather_experts` for TPUs, where XLA copies all experts' kernels to gather a few of them."""
    rounded = kernels.dtype == jnp.int8
    kernels = _as_on_tpu(kernels) if rounded else kernels

    def run(one: tuple[Float[Array, " D"], Int[Array, ""]]) -> Float[Array, "..."]:
        row, kernel = one[0][None], kernels[one[1]]
        return (integer_sums(_ON_TPU, row, kernel) if rounded else matmul(row, kernel))[0]

    return lax.map(run, (rows, expert))


def _integers_by_blocks(
    rows: Float[Array, "M D"], kernels: Int8[Array, "E D ..."], expert: Int[Array, " M"]
) -> Float[Array, "M ..."]:
    """`_by_blocks` with integers, for TPUs."""
    return _by_blocks(rows, _as_on_tpu(kernels), expert, spec=_ON_TPU)


def _as_on_tpu(kernels: Int8[Array, "E D ..."]) -> Int8[Array, "E ..."]:
    """Integers in a TPU's own axis order, inputs second to last; for any other order, XLA would copy them."""
    return jnp.moveaxis(kernels, 1, -2)


def _by_runs(
    rows: Float[Array, "M D"], kernels: Float[Array, "E D ..."] | Int8[Array, "E D ..."], expert: Int[Array, " M"]
) -> Float[Array, "M ..."]:
    sizes = jnp.bincount(expert, length=kernels.shape[0]).astype(jnp.int32)
    flat = kernels.reshape(*kernels.shape[:2], -1)
    summed_in = jnp.float32 if flat.dtype == jnp.int8 else None
    precision = matmul_precision(rows.dtype)
    out = lax.ragged_dot(rows, flat.astype(rows.dtype), sizes, precision, summed_in)
    return out.reshape(-1, *kernels.shape[2:])


def _by_blocks(
    rows: Float[Array, "M D"],
    kernels: Float[Array, "E D ..."] | Int8[Array, "E ..."],
    expert: Int[Array, " M"],
    spec: str = "md,d...->m...",
) -> Float[Array, "M ..."]:
    """Pads each expert's rows to whole blocks; for CPUs, where `lax.ragged_dot` multiplies every row with every expert.

    Args:
      spec: einsum of one expert's product, for integers.
    """
    (count, width), experts = rows.shape, kernels.shape[0]
    size = -(-count // experts)
    blocks = count // size + experts  # enough for every distribution of rows
    sizes = jnp.bincount(expert, length=experts).astype(jnp.int32)
    # Blocks that each expert fills, and how far its rows shift to begin at a whole block.
    filled = (sizes + jnp.int32(size - 1)) // jnp.int32(size)
    ends = jnp.cumsum(filled, dtype=jnp.int32)
    shift = (ends - filled) * jnp.int32(size) - (jnp.cumsum(sizes, dtype=jnp.int32) - sizes)
    place = jnp.arange(count, dtype=jnp.int32) + shift[expert]
    padded = jnp.zeros((blocks * size, width), rows.dtype).at[place].set(rows)
    # The expert of each block; blocks after the last are empty and may have any.
    owner = jnp.searchsorted(ends, jnp.arange(blocks, dtype=jnp.int32), side="right")
    owner = jnp.minimum(owner, experts - 1)

    def run(block: tuple[Float[Array, "S D"], Int[Array, ""]]) -> Float[Array, "S ..."]:
        kernel = kernels[block[1]]
        return integer_sums(spec, block[0], kernel) if kernel.dtype == jnp.int8 else matmul(block[0], kernel)

    out = lax.map(run, (padded.reshape(blocks, size, width), owner))
    return out.reshape(blocks * size, *out.shape[2:])[place]


def router_logits(router: Dense, tokens: Float[Array, "N D"]) -> Float[Array, "N E"]:
    """Router logits, float32; rounded logits would choose other experts where scores are close."""
    logits = einsum("td,ed->te", tokens.astype(jnp.float32), router.weights(jnp.dtype(jnp.float32)))
    return logits if router.bias is None else logits + router.bias[...].astype(jnp.float32)[None, :]


def choose_experts(
    moe: MoEConfig, logits: Float[Array, "N E"], correction: Float[Array, " E"] | None = None
) -> tuple[Float[Array, "N K"], Int[Array, "N K"]]:
    """The chosen experts of each token and their weights, float32.

    Args:
      logits: the router's logits, float32.
      correction: added to scores (or logits) for the choice, but not for the weights.
    """
    if moe.score == "sparsemixer":
        return _sparsemixer(logits, moe.experts_per_token, moe.sparsemixer_threshold)
    scores = jax.nn.softmax(logits, axis=-1) if moe.score == "softmax" else jax.nn.sigmoid(logits)
    # A correction changes which experts are chosen, but not their weights.
    choice = scores
    if correction is not None:
        choice = (logits if moe.correction == "logit" else scores) + correction[None, :]
    if moe.groups > 1:
        choice = _only_best_groups(moe, choice)
    _, chosen = lax.top_k(choice, moe.experts_per_token)
    weights = jnp.take_along_axis(scores, chosen, axis=-1)
    if moe.renormalise:
        weights = weights / (jnp.sum(weights, axis=-1, keepdims=True) + 1e-20)
    return weights * moe.scale, chosen


def _only_best_groups(moe: MoEConfig, choice: Float[Array, "N E"]) -> Float[Array, "N E"]:
    """Sets the scores of experts outside the best groups to minus infinity, or to zero."""
    grouped = choice.reshape(choice.shape[0], moe.groups, -1)
    # A group scores as its best expert, or as the sum of its best two.
    best, _ = lax.top_k(grouped, 1 if moe.group_score == "max" else min(2, grouped.shape[-1]))
    _, kept = lax.top_k(jnp.sum(best, axis=-1), moe.groups_kept)
    eligible = jnp.any(jax.nn.one_hot(kept, moe.groups, dtype=jnp.bool_), axis=1)
    return jnp.where(eligible[:, :, None], grouped, 0.0 if moe.others_score_zero else -jnp.inf).reshape(choice.shape)


def _sparsemixer(
    logits: Float[Array, "N E"], count: int, threshold: float
) -> tuple[Float[Array, "N K"], Int[Array, "N K"]]:
    """Chooses experts one at a time; a weight is the expert's softmax share among the experts close to it."""
    weights, chosen, left = [], [], logits
    for _ in range(count):
        best = jnp.argmax(left, axis=-1)[:, None]
        peak = jnp.take_along_axis(left, best, axis=-1)
        # Only near ties, by relative distance from the best logit, share the softmax.
        far = (peak - logits) / jnp.maximum(jnp.abs(logits), peak) > threshold
        shares = jax.nn.softmax(jnp.where(far, -jnp.inf, left), axis=-1)
        weights.append(jnp.take_along_axis(shares, best, axis=-1))
        chosen.append(best)
        # The next round excludes this expert.
        left = jnp.where(jax.nn.one_hot(best[:, 0], logits.shape[-1], dtype=jnp.bool_), -jnp.inf, left)
    return jnp.concatenate(weights, axis=-1), jnp.concatenate(chosen, axis=-1).astype(jnp.int32)
