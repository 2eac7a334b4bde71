"""The parts of an architecture, each as flags: rotary embedding, attention, experts, output head.

`tide_jax.model.architecture.DecoderConfig` combines them.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, get_args

from tide_jax.errors import TideError
from tide_jax.ranges import (
    Channels,
    ChannelsOrZero,
    Epsilon,
    Experts,
    ExpertsOrZero,
    Heads,
    LayerIndex,
    NotNegative,
    PositionCount,
    PositionsOrZero,
    Positive,
    Theta,
)
from tide_jax.records import STRICT

NormKind = Literal["rms", "layer"]
RopeKind = Literal["default", "linear", "dynamic", "llama3", "yarn", "longrope", "proportional"]
ExpertScore = Literal["softmax", "sigmoid", "sparsemixer"]
Correction = Literal["none", "score", "logit"]
GroupScore = Literal["max", "top2"]
PlainActivation = Literal[
    "silu", "swish", "gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "quick_gelu", "relu", "relu2", "tanh"
]
GatedActivation = Literal[PlainActivation, "swiglu_oai"]
UngatedActivation = Literal[PlainActivation, "xielu"]


def check_choice(name: str, value: object, choices: Any) -> None:
    """Raises TideError, with `name` in its message, if the value is not one of a Literal's."""
    if not isinstance(value, str) or value not in get_args(choices):
        raise TideError(f"{name}={value!r} is not known; choose one of {', '.join(get_args(choices))}")


def check_multiple(name: str, number: int, other_name: str, other: int) -> None:
    """Raises TideError, with both names in its message, unless one number is a multiple of the other."""
    if other <= 0 or number % other:
        raise TideError(
            f"{name}={number} is not a multiple of {other_name}={other}; check the checkpoint's config.json"
        )


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding of one attention type (RoFormer, Su et al. 2021, and its long-context variants).

    Attributes:
      theta: base period.
      rotary_dim: leading channels of each head that are rotated; the rest pass through.
      kind: method that stretches frequencies beyond the trained context.
      factor: stretch factor; "default" ignores it.
      max_positions: trained context; "dynamic" stretches beyond it.
      original_max_positions: context before extension, for "llama3", "yarn" and "longrope".
      attention_factor: multiplies cos and sin, for "yarn" and "longrope".
      low_freq_factor, high_freq_factor: band edges of "llama3".
      beta_slow, beta_fast, truncate: ramp of "yarn".
      turning: number of leading frequencies that rotate in "proportional"; the other frequencies are 0.
      short_factor, long_factor: per-frequency divisors of "longrope", ``rotary_dim // 2`` each.
      interleaved: pairs neighbouring channels (GPT-J) instead of the first half with the second half (GPT-NeoX).
      reverse: rotates in the opposite direction.
      values: rotates values too.
    """

    theta: Theta
    rotary_dim: Channels
    kind: RopeKind = "default"
    factor: Positive = 1.0
    max_positions: PositionsOrZero = 0
    original_max_positions: PositionsOrZero = 0
    attention_factor: Positive = 1.0
    low_freq_factor: Positive = 1.0
    high_freq_factor: Positive = 4.0
    beta_slow: Positive = 1.0
    beta_fast: Positive = 32.0
    truncate: bool = True
    turning: ChannelsOrZero = 0
    short_factor: tuple[Positive, ...] = ()
    long_factor: tuple[Positive, ...] = ()
    interleaved: bool = False
    reverse: bool = False
    values: bool = False

    __pydantic_config__ = STRICT


@dataclasses.dataclass(frozen=True)
class QKNorm:
    """Normalisation of queries and keys (Dehghani et al. 2023, arXiv:2302.05442, section 2), float32 inside.

    Attributes:
      kind: "rms" or "layer".
      eps: added to the mean square.
      all_heads: takes one mean over all heads' channels, instead of one for each head.
      per_head: every head has its own scale (and bias); always true with `all_heads`.
      scale, bias: whether the norm has one.
      unit_offset: multiplies by ``1 + scale``.
      after_rope: normalises after the rotation instead of before it.
    """

    kind: NormKind = "rms"
    eps: Epsilon = 1e-6
    all_heads: bool = False
    per_head: bool = False
    scale: bool = True
    bias: bool = False
    unit_offset: bool = False
    after_rope: bool = False

    __pydantic_config__ = STRICT


@dataclasses.dataclass(frozen=True)
class QueryScaling:
    """Queries grow with the logarithm of their position: times ``1 + beta * log(1 + (position + offset) // period)``.

    This keeps attention sharp over long contexts; the idea is from Nakanishi 2025, arXiv:2501.19399.

    Attributes:
      power: multiplies by ``(1 + (position + offset) / period) ** beta`` instead.
    """

    beta: float
    period: Positive
    offset: PositionsOrZero = 0
    power: bool = False

    __pydantic_config__ = STRICT


@dataclasses.dataclass(frozen=True)
class AttentionType:
    """Properties of attention that may differ between layers.

    Attributes:
      scale: multiplies query-key products.
      window: number of tokens that a query sees, itself included; None for all.
      chunk: a query sees only tokens with the same ``position // chunk``; None for all.
      rope: rotary embedding, None for none.
      qk_norm: normalisation of queries and keys, None for none.
      alibi: slope of each head's linear bias (Press et al. 2022, arXiv:2108.12409), empty for none.
      alibi_bfloat16: the bias depends on the key's position alone, is rounded to bfloat16 and is multiplied by `scale`.
      sinks: each head's softmax has a learned extra term without a value (Xiao et al. 2023, arXiv:2309.17453).
      query_scaling: growth of queries with their position, None for none.
      num_heads: number of query heads if it differs from the configuration's.
      out_bias: the output projection has a bias, even if the configuration gives it none.
      differential: initial value of the learned weight with which the second half of the heads is subtracted from the
        first (Ye et al. 2024, arXiv:2410.05258); None for ordinary attention.
      head_dim, num_kv_heads, latent: set if they differ from the configuration's.
      value_norm: divides values by their root mean square.
      keys_as_values: values are the keys before their norm and rotation.
      dynamic_mask: each key has its own score, learned from its values (Shi et al. 2025, arXiv:2508.02124).
    """

    scale: Positive
    window: PositionCount | None = None
    chunk: PositionCount | None = None
    rope: RopeConfig | None = None
    qk_norm: QKNorm | None = None
    alibi: tuple[NotNegative, ...] = ()
    alibi_bfloat16: bool = False
    sinks: bool = False
    query_scaling: QueryScaling | None = None
    num_heads: Heads | None = None
    out_bias: bool = False
    differential: float | None = None
    head_dim: Channels | None = None
    num_kv_heads: Heads | None = None
    latent: LatentConfig | None = None
    value_norm: bool = False
    keys_as_values: bool = False
    dynamic_mask: bool = False

    __pydantic_config__ = STRICT


@dataclasses.dataclass(frozen=True)
class LatentConfig:
    """Multi-head latent attention: keys and values share one low-rank vector (DeepSeek-V2, arXiv:2405.04434).

    Attributes:
      kv_rank: width of the latent vector from which a token's keys and values are computed.
      q_rank: width of the queries' low-rank bottleneck, None for none.
      nope_dim: channels of a head's query and key that are not rotated.
      rope_dim: rotated channels, shared by all heads' keys.
      value_dim: channels of a head's value.
      q_scale, kv_scale: multiply the normed bottlenecks.
      key_norm: norms the shared part of keys before its rotation.
      raw_queries: queries, and the gate of the attention's output if there is one, read the queries' bottleneck twice:
        normed, and as it is.
    """

    kv_rank: Channels
    q_rank: Channels | None
    nope_dim: Channels
    rope_dim: Channels
    value_dim: Channels
    norm_eps: Epsilon = 1e-6
    q_scale: Positive = 1.0
    kv_scale: Positive = 1.0
    key_norm: bool = False
    raw_queries: bool = False

    __pydantic_config__ = STRICT


@dataclasses.dataclass(frozen=True)
class AddScales:
    """How a sublayer's output joins the residual stream.

    Attributes:
      stream: multiplies the residual stream.
      update: multiplies the output before it is added.
    """

    stream: Positive = 1.0
    update: Positive = 1.0

    __pydantic_config__ = STRICT


@dataclasses.dataclass(frozen=True)
class HeadTransform:
    """Dense layer, activation and norm before the output projection (BERT, Devlin et al. 2019, arXiv:1810.04805).

    Attributes:
      activation: applied after the dense layer.
      size: width of the dense layer, and so of the output projection; None for the embeddings' width.
      bias: whether the dense layer has a bias.
    """

    activation: str
    size: Channels | None = None
    bias: bool = True

    __pydantic_config__ = STRICT

    def __post_init__(self) -> None:
        check_choice("activation", self.activation, PlainActivation)


@dataclasses.dataclass(frozen=True)
class MoEConfig:
    """Mixture of experts in place of a layer's MLP: each token runs through the best few of many experts.

    Attributes:
      num_experts, experts_per_token: number of experts, and number that each token uses.
      zero_experts: number of further experts that the router may choose, which return the token as it is.
      intermediate_size: hidden width of an expert.
      layers: the layers with experts; None for all.
      score: turns router logits into scores: "softmax" over all experts, "sigmoid" of each, or "sparsemixer" (Liu et
        al. 2023, arXiv:2310.00811, section 3: each choice is scored against its near ties).
      sparsemixer_threshold: largest relative distance from the best logit at which an expert is a near tie.
      renormalise: divides the chosen scores by their sum.
      scale: multiplies the (renormalised) scores.
      correction: a learned bias on each "score" (or router "logit"). It decides which experts are chosen but does not
        change their weights (DeepSeek-V3, arXiv:2412.19437, section 2.1.2).
      groups, groups_kept: experts lie in groups, and only experts of the best groups are eligible (DeepSeek-V2, 2.1.2).
      others_score_zero: experts of other groups are not excluded, but score 0.
      group_score: a group scores as its best expert ("max") or as the sum of its best two ("top2").
      router_bias, expert_bias: whether the router and the experts have biases.
      router_softcap: ``cap * tanh(x / cap)`` on router logits.
      gated: experts are ``down(act(gate x) * up x)``; otherwise ``down(act(up x))``.
      scale_input: scores multiply an expert's input instead of its output.
      shared_size: hidden width of an additional MLP for every token; 0 for none.
      shared_scale: multiplies that MLP's output.
      shared_gate: the sigmoid of a learned projection multiplies that MLP's output.
      output_norm: normalises the sum of routed and shared experts, with the norm that `DecoderConfig.norm` names.
      output_bias: adds a learned vector to the sum of routed experts.
    """

    num_experts: Experts
    experts_per_token: Experts
    intermediate_size: Channels
    zero_experts: ExpertsOrZero = 0
    layers: tuple[LayerIndex, ...] | None = None
    score: ExpertScore = "softmax"
    sparsemixer_threshold: NotNegative = 0.0
    renormalise: bool = True
    scale: Positive = 1.0
    correction: Correction = "none"
    groups: Experts = 1
    groups_kept: Experts = 1
    others_score_zero: bool = False
    group_score: GroupScore = "top2"
    router_bias: bool = False
    expert_bias: bool = False
    router_softcap: Positive | None = None
    gated: bool = True
    scale_input: bool = False
    shared_size: ChannelsOrZero = 0
    shared_scale: Positive = 1.0
    shared_gate: bool = False
    output_norm: bool = False
    output_bias: bool = False

    __pydantic_config__ = STRICT

    def __post_init__(self) -> None:
        check_choice("score", self.score, ExpertScore)
        check_choice("correction", self.correction, Correction)
        check_choice("group_score", self.group_score, GroupScore)
        if not 0 < self.experts_per_token <= self.num_experts + self.zero_experts:
            raise TideError(
                f"experts_per_token={self.experts_per_token} must lie between 1 and num_experts={self.num_experts}"
            )
        if self.groups < 1 or self.num_experts % self.groups or not 0 < self.groups_kept <= self.groups:
            raise TideError(
                f"{self.num_experts} experts cannot lie in groups={self.groups}, of which groups_kept="
                f"{self.groups_kept} are kept; check the checkpoint's config.json"
            )
