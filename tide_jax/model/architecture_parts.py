"""The parts of an architecture: rotary embedding, attention, experts, output head, each as flags.

`tide_jax.model.architecture.DecoderConfig` puts them together.
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
    """Raises TideError, naming it `name`, for a value that is not among a Literal's."""
    if not isinstance(value, str) or value not in get_args(choices):
        raise TideError(f"{name}={value!r} is not known; choose one of {', '.join(get_args(choices))}")


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding of one attention type (RoFormer, Su et al. 2021, and its long-context variants).

    Attributes:
      theta: base period.
      rotary_dim: leading channels of each head that are rotated; the rest pass through.
      kind: how frequencies are stretched beyond the trained context.
      factor: stretch factor of every kind but "default".
      max_positions: trained context; "dynamic" stretches beyond it.
      original_max_positions: context before extension, for "llama3", "yarn" and "longrope".
      attention_factor: multiplies cos and sin, for "yarn" and "longrope".
      low_freq_factor, high_freq_factor: band edges of "llama3".
      beta_slow, beta_fast, truncate: ramp of "yarn".
      turning: how many of the leading frequencies turn in "proportional"; the others stand still.
      short_factor, long_factor: per-frequency divisors of "longrope", ``rotary_dim // 2`` each.
      interleaved: neighbouring channels rotate together (GPT-J), instead of the first half with the second (GPT-NeoX).
      reverse: rotate the other way round.
      values: values are rotated too.
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
      all_heads: one mean over all heads' channels instead of one for each head.
      per_head: every head has a scale (and bias) of its own; always so with `all_heads`.
      scale, bias: whether there is one.
      unit_offset: multiply by ``1 + scale``.
      after_rope: normalise after the rotation instead of before it.
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

    Keeps attention sharp over long contexts (Nakanishi 2025, arXiv:2501.19399, is the idea).

    Attributes:
      power: times ``(1 + (position + offset) / period) ** beta`` instead.
    """

    beta: float
    period: Positive
    offset: PositionsOrZero = 0
    power: bool = False

    __pydantic_config__ = STRICT


@dataclasses.dataclass(frozen=True)
class AttentionType:
    """What may differ between the attention of one layer and the next.

    Attributes:
      scale: multiplies query-key products.
      window: tokens a query sees, itself included; None is all of them.
      chunk: a query sees only tokens whose ``position // chunk`` is its own; None is all of them.
      rope: rotary embedding, None for none.
      qk_norm: normalisation of queries and keys, None for none.
      alibi: slope of each head's linear bias (Press et al. 2022, arXiv:2108.12409), empty for none.
      alibi_bfloat16: the bias is that of a key's position, rounded to bfloat16, and multiplied by `scale` too.
      sinks: each head's softmax has a learned extra term without a value (Xiao et al. 2023, arXiv:2309.17453).
      query_scaling: growth of queries with their position, None for none.
      num_heads: query heads, where their number differs from the configuration's.
      out_bias: the output projection has a bias where the configuration gives it none.
      differential: the second half of the heads is subtracted from the first, weighted by a learned number that
        starts at this one (Ye et al. 2024, arXiv:2410.05258); None for ordinary attention.
      head_dim, num_kv_heads: where they differ from the configuration's.
      value_norm: values are divided by the root of their mean square, too.
      keys_as_values: values are what keys are before their norm and rotation.
      dynamic_mask: keys have scores of their own, learned from their values (Shi et al. 2025, arXiv:2508.02124).
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
    value_norm: bool = False
    keys_as_values: bool = False
    dynamic_mask: bool = False

    __pydantic_config__ = STRICT


@dataclasses.dataclass(frozen=True)
class LatentConfig:
    """Multi-head latent attention: keys and values are kept as one low-rank vector (DeepSeek-V2, arXiv:2405.04434).

    Attributes:
      kv_rank: width of the latent vector a token's keys and values are made from.
      q_rank: width of the queries' low-rank bottleneck, None for none.
      nope_dim: channels of a head's query and key that are not rotated.
      rope_dim: rotated channels, shared by all heads' keys.
      value_dim: channels of a head's value.
      q_scale, kv_scale: multiply the normed bottlenecks.
    """

    kv_rank: Channels
    q_rank: Channels | None
    nope_dim: Channels
    rope_dim: Channels
    value_dim: Channels
    norm_eps: Epsilon = 1e-6
    q_scale: Positive = 1.0
    kv_scale: Positive = 1.0

    __pydantic_config__ = STRICT


@dataclasses.dataclass(frozen=True)
class HeadTransform:
    """Dense layer, activation and norm before the output projection (BERT, Devlin et al. 2019, arXiv:1810.04805).

    Attributes:
      activation: after the dense layer.
      size: its width, which the output projection then has; None is the embeddings'.
      bias: whether the dense layer has one.
    """

    activation: str
    size: Channels | None = None
    bias: bool = True

    __pydantic_config__ = STRICT

    def __post_init__(self) -> None:
        check_choice("activation", self.activation, PlainActivation)


@dataclasses.dataclass(frozen=True)
class MoEConfig:
    """Mixture of experts in place of a layer's MLP: each token goes through the best few of many.

    Attributes:
      num_experts, experts_per_token: how many there are, how many a token uses.
      intermediate_size: hidden width of an expert.
      layers: the layers with experts; None is all of them.
      score: how router logits become scores: "softmax" over all experts, "sigmoid" of each, or "sparsemixer"
        (Liu et al. 2023, arXiv:2310.00811, section 3: each choice is scored against its near ties).
      sparsemixer_threshold: relative distance from the best logit beyond which an expert is no near tie.
      renormalise: divide the chosen scores by their sum.
      scale: multiplies the (renormalised) scores.
      correction: a learned bias on each "score" (or router "logit") decides the choice but not the weights
        (DeepSeek-V3, arXiv:2412.19437, section 2.1.2).
      groups, groups_kept: experts lie in groups, and only those of the best groups are eligible (DeepSeek-V2, 2.1.2).
      group_score: a group is as good as its best expert ("max") or its best two together ("top2").
      router_bias, expert_bias: whether there are any.
      router_softcap: ``cap * tanh(x / cap)`` on router logits.
      scale_input: scores multiply an expert's input instead of its output.
      shared_size: hidden width of an MLP every token goes through besides; 0 is none.
      shared_scale: multiplies that MLP's output.
      shared_gate: that MLP's output is multiplied by the sigmoid of a learned projection.
      output_norm: the sum of routed and shared experts is normed, as `DecoderConfig.norm` says.
      output_bias: a learned vector is added to the sum of routed experts.
    """

    num_experts: Experts
    experts_per_token: Experts
    intermediate_size: Channels
    layers: tuple[LayerIndex, ...] | None = None
    score: ExpertScore = "softmax"
    sparsemixer_threshold: NotNegative = 0.0
    renormalise: bool = True
    scale: Positive = 1.0
    correction: Correction = "none"
    groups: Experts = 1
    groups_kept: Experts = 1
    group_score: GroupScore = "top2"
    router_bias: bool = False
    expert_bias: bool = False
    router_softcap: Positive | None = None
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
        if not 0 < self.experts_per_token <= self.num_experts:
            raise TideError(
                f"experts_per_token={self.experts_per_token} must lie between 1 and num_experts={self.num_experts}"
            )
        if self.groups < 1 or self.num_experts % self.groups or not 0 < self.groups_kept <= self.groups:
            raise TideError(
                f"{self.num_experts} experts cannot lie in groups={self.groups}, of which groups_kept="
                f"{self.groups_kept} are kept; check the checkpoint's config.json"
            )
