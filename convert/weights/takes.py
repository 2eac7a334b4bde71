"""Arrangements of source tensors: each selects the part that fills a slot of a parameter, as a view.

torch's Linear weights are [out, in] and fuse axes; tide_jax's are [in..., out...] with separate axes for heads. An
export writes a checkpoint back through these views. Where the parts are not contiguous enough for a view, a copy is
allowed, but no arithmetic.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from convert.weights.rules import Take
from tide_jax.model.architecture import DecoderConfig


def transpose(a: np.ndarray, c: DecoderConfig) -> np.ndarray:
    """[out, in] to [in, out]; of experts, [E, out, in] to [E, in, out]."""
    return a.swapaxes(-1, -2)


def heads_out(a: np.ndarray, c: DecoderConfig) -> np.ndarray:
    """[heads * hd, D] to [D, heads, hd]."""
    return a.T.reshape(a.shape[1], -1, c.head_dim)


def query_heads(a: np.ndarray, c: DecoderConfig) -> np.ndarray:
    """Queries of a layer that has its own head width, [heads * hd, ...] to [..., heads, hd]."""
    return a.T.reshape(*a.shape[:0:-1], c.num_heads, -1)


def query_heads_in(a: np.ndarray, c: DecoderConfig) -> np.ndarray:
    """Output projection of a layer that has its own head width, [D, heads * hd] to [heads, hd, D]."""
    return a.T.reshape(c.num_heads, -1, a.shape[0])


def kv_heads(a: np.ndarray, c: DecoderConfig) -> np.ndarray:
    """Keys or values of a layer that has its own number and width of heads, [kv * hd, ...] to [..., kv, hd]."""
    shapes = [(kind.num_kv_heads or c.num_kv_heads, kind.head_dim or c.head_dim) for kind in c.attention_types]
    heads = next((kv for kv, hd in shapes if kv * hd == a.shape[0]), 1)
    return a.T.reshape(*a.shape[:0:-1], heads, -1)


def heads_in(a: np.ndarray, c: DecoderConfig) -> np.ndarray:
    """[D, heads * hd] to [heads, hd, D]. Layers may differ in the number of heads, or else in their width."""
    by_width = any(kind.num_heads for kind in c.attention_types)
    return a.T.reshape(-1, c.head_dim, a.shape[0]) if by_width else a.T.reshape(c.num_heads, -1, a.shape[0])


def heads_bias(a: np.ndarray, c: DecoderConfig) -> np.ndarray:
    """[heads * hd] to [heads, hd]."""
    return a.reshape(-1, c.head_dim)


def heads_norm(a: np.ndarray, c: DecoderConfig) -> np.ndarray:
    """A norm's weight, [heads * hd] to [heads, hd] if each head has its own; a shared one stays as it is."""
    own = any(kind.qk_norm.all_heads or kind.qk_norm.per_head for kind in c.attention_types if kind.qk_norm)
    return a.reshape(-1, c.head_dim) if own else a


def one_element_vector(a: np.ndarray, c: DecoderConfig) -> np.ndarray:
    """A scalar to a vector of one."""
    return a.reshape(1)


def attention_gate(a: np.ndarray, c: DecoderConfig) -> np.ndarray:
    """Gate of the attention output, [heads * hd, D] to [D, heads, hd] or [heads, D] to [D, heads, 1]."""
    return a.T.reshape(a.shape[1], -1, 1 if c.attention_gate == "head" else c.head_dim)


def column(a: np.ndarray, c: DecoderConfig) -> np.ndarray:
    """[N] to [N, 1]."""
    return a[:, None]


def values_out(a: np.ndarray, c: DecoderConfig) -> np.ndarray:
    """Values with their own width, [heads * vd, ...] to [..., heads, vd]."""
    assert c.value_dim is not None
    return a.T.reshape(*a.shape[1:], -1, c.value_dim)


def conv1d_in(a: np.ndarray, c: DecoderConfig) -> np.ndarray:
    """GPT-2's Conv1D, already [in, out]: [heads * hd, D] to [heads, hd, D]."""
    return a.reshape(c.num_heads, -1, a.shape[1])


def halves(a: np.ndarray, c: DecoderConfig) -> np.ndarray:
    """Gate, then up projection: [2 F, D] to [D, 2, F], [2 F] to [2, F]."""
    return a.T.reshape(*a.shape[1:], 2, -1)


def stacked_halves(a: np.ndarray, c: DecoderConfig) -> np.ndarray:
    """Gate, then up projection of stacked experts in torch's order: [E, 2 F, D] to [E, D, 2, F]."""
    return a.swapaxes(1, 2).reshape(a.shape[0], a.shape[2], 2, -1)


def split_halves(a: np.ndarray, c: DecoderConfig) -> np.ndarray:
    """Gate, then up projection of stacked experts: [E, D, 2 F] to [E, D, 2, F]."""
    return a.reshape(*a.shape[:-1], 2, -1)


def alternating_halves(a: np.ndarray, c: DecoderConfig) -> np.ndarray:
    """Gate and up projections of stacked experts, alternating by channel: [E, ..., 2 F] to [E, ..., 2, F]."""
    return a.reshape(*a.shape[:-1], -1, 2).swapaxes(-1, -2)


def experts_out(a: np.ndarray, c: DecoderConfig) -> np.ndarray:
    """Experts' projections stacked along their outputs: [E * F, D] to [E, D, F]."""
    return experts_in(a, c).swapaxes(1, 2)


def experts_in(a: np.ndarray, c: DecoderConfig) -> np.ndarray:
    """Experts' projections stacked along their inputs: [E * F, D] to [E, F, D]."""
    assert c.moe is not None
    return a.reshape(c.moe.num_experts, -1, a.shape[-1])


def flatten(a: np.ndarray, c: DecoderConfig) -> np.ndarray:
    """Drops leading axes of size 1: [1, E] to [E]."""
    return a.reshape(-1)


def blocks(parts: int, pick: int | slice) -> Take:
    """Selects from projections with equal head counts, concatenated in a Conv1D [..., parts * H * hd].

    Returns [..., H, hd] for one part, [..., H, parts picked, hd] for several.
    """

    def take(a: np.ndarray, c: DecoderConfig) -> np.ndarray:
        selected = a.reshape(*a.shape[:-1], parts, c.num_heads, c.head_dim)[..., pick, :, :]
        return selected if isinstance(pick, int) else selected.swapaxes(-3, -2)

    return take


def fused_by_head(pick: int | slice) -> Take:
    """From queries, keys and values fused by head in a Linear [H * (q, k, v) * hd, ...]: [..., H, (picked), hd]."""

    def take(a: np.ndarray, c: DecoderConfig) -> np.ndarray:
        return a.T.reshape(*a.shape[1:], c.num_heads, 3, c.head_dim)[..., pick, :]

    return take


def codegen_blocks(pick: int) -> Take:
    """One role of CodeGen's Linear [3 * H * hd, D], which has four blocks of queries, values and keys: [D, H, hd].

    Blocks of one role are not adjacent, so this is a copy.
    """

    def take(a: np.ndarray, c: DecoderConfig) -> np.ndarray:
        blocks = a.T.reshape(a.shape[1], 4, 3, c.num_heads // 4, c.head_dim)
        return blocks[:, :, pick].reshape(a.shape[1], c.num_heads, c.head_dim)

    return take


def grouped_q(a: np.ndarray, c: DecoderConfig) -> np.ndarray:
    """Queries of a Linear [KV * (g + 2) * hd, ...] that stores each key-value head after its queries: [..., H, hd].

    A view if there is one group, or one query per group.
    """
    return _split_groups(a, c)[..., :-2, :].reshape(*a.shape[:0:-1], c.num_heads, c.head_dim)


def grouped_kv(a: np.ndarray, c: DecoderConfig) -> np.ndarray:
    """Keys and values of a grouped Linear [KV * (g + 2) * hd, ...]: [..., KV, 2, hd]."""
    return _split_groups(a, c)[..., -2:, :]


def _split_groups(a: np.ndarray, c: DecoderConfig) -> np.ndarray:
    return a.T.reshape(*a.shape[:0:-1], c.num_kv_heads, c.num_heads // c.num_kv_heads + 2, c.head_dim)


def fused_q(a: np.ndarray, c: DecoderConfig) -> np.ndarray:
    """Queries of a Linear [(H + 2 KV) * hd, ...] that holds queries, keys and values: [..., H, hd]."""
    return a.T.reshape(*a.shape[1:], -1, c.head_dim)[..., : c.num_heads, :]


def fused_kv(a: np.ndarray, c: DecoderConfig) -> np.ndarray:
    """Keys and values of a Linear [(H + 2 KV) * hd, ...]: [..., KV, 2, hd]."""
    both = a.T.reshape(*a.shape[1:], -1, c.head_dim)[..., c.num_heads :, :]
    return both.reshape(*both.shape[:-2], 2, -1, c.head_dim).swapaxes(-3, -2)


def expert_queries(a: np.ndarray, c: DecoderConfig) -> np.ndarray:
    """Query projections of attention experts, [E, KV * hd, D] to [E, D, KV, hd]."""
    return a.swapaxes(1, 2).reshape(a.shape[0], a.shape[2], -1, c.head_dim)


def expert_outputs(a: np.ndarray, c: DecoderConfig) -> np.ndarray:
    """Output projections of attention experts, [E, D, KV * hd] to [E, KV, hd, D]."""
    return a.swapaxes(1, 2).reshape(a.shape[0], -1, c.head_dim, a.shape[1])


def keys_values(a: np.ndarray, c: DecoderConfig) -> np.ndarray:
    """Keys and values of a Linear [2 * KV * hd, D] that holds nothing else: [D, KV, 2, hd]."""
    return a.T.reshape(a.shape[1], 2, -1, c.head_dim).swapaxes(1, 2)


def latent_keys(a: np.ndarray, c: DecoderConfig) -> np.ndarray:
    """Keys of latent attention's up-projection [H * (nope + value), R]: [R, H, nope]."""
    assert c.latent is not None
    return a.T.reshape(a.shape[1], c.num_heads, -1)[..., : c.latent.nope_dim]


def latent_values(a: np.ndarray, c: DecoderConfig) -> np.ndarray:
    """Values of latent attention's up-projection [H * (nope + value), R]: [R, H, value]."""
    assert c.latent is not None
    return a.T.reshape(a.shape[1], c.num_heads, -1)[..., c.latent.nope_dim :]


def latent_queries(a: np.ndarray, c: DecoderConfig) -> np.ndarray:
    """Queries of a Linear [H * (hd + value), R] that has each head's gate behind its query: [R, H, hd]."""
    return a.T.reshape(a.shape[1], c.num_heads, -1)[..., : c.head_dim]


def latent_gate(a: np.ndarray, c: DecoderConfig) -> np.ndarray:
    """Gate of a Linear [H * (hd + value), R] that has each head's gate behind its query: [R, H, value]."""
    return a.T.reshape(a.shape[1], c.num_heads, -1)[..., c.head_dim :]


def of_type(number: int, take: Take) -> Take:
    """The same arrangement for layers with the attention type of a number, which has its own heads."""

    def take_own(a: np.ndarray, c: DecoderConfig) -> np.ndarray:
        kind = c.attention_types[number]
        heads = kind.num_heads or c.num_heads
        return take(a, dataclasses.replace(c, num_heads=heads, num_kv_heads=heads, latent=kind.latent or c.latent))

    return take_own
