"""What a decoder is: its architecture as orthogonal flags.

Every class here is a frozen, hashable dataclass of plain Python values, so it can be a static argument of
``jax.jit`` and can be written to JSON. A model family is a point in the space of `DecoderConfig`'s flags; nothing
in the model asks which family it is.
"""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from typing import Any, Literal, get_args

from tide_jax.errors import TideError

NormKind = Literal["rms", "layer"]
NormPlacement = Literal["pre", "post", "sandwich", "residual"]
Positions = Literal["rope", "learned", "sinusoidal", "none"]
RopeKind = Literal["default", "linear", "dynamic", "llama3", "yarn", "longrope", "proportional"]
AttentionGate = Literal["none", "head", "channel"]
GateActivation = Literal["sigmoid", "softplus"]
ExpertScore = Literal["softmax", "sigmoid", "sparsemixer"]
Correction = Literal["none", "score", "logit"]
GroupScore = Literal["max", "top2"]


def check_choice(name: str, value: object, choices: Any) -> None:
    """Raises TideError, naming it `name`, for a value that is not among a Literal's."""
    if value not in get_args(choices):
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

    theta: float
    rotary_dim: int
    kind: RopeKind = "default"
    factor: float = 1.0
    max_positions: int = 0
    original_max_positions: int = 0
    attention_factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_slow: float = 1.0
    beta_fast: float = 32.0
    truncate: bool = True
    turning: int = 0
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()
    interleaved: bool = False
    reverse: bool = False
    values: bool = False


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
    eps: float = 1e-6
    all_heads: bool = False
    per_head: bool = False
    scale: bool = True
    bias: bool = False
    unit_offset: bool = False
    after_rope: bool = False


@dataclasses.dataclass(frozen=True)
class QueryScaling:
    """Queries grow with the logarithm of their position: times ``1 + beta * log(1 + (position + offset) // period)``.

    Keeps attention sharp over long contexts (Nakanishi 2025, arXiv:2501.19399, is the idea).

    Attributes:
      power: times ``(1 + (position + offset) / period) ** beta`` instead.
    """

    beta: float
    period: float
    offset: int = 0
    power: bool = False


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

    scale: float
    window: int | None = None
    chunk: int | None = None
    rope: RopeConfig | None = None
    qk_norm: QKNorm | None = None
    alibi: tuple[float, ...] = ()
    alibi_bfloat16: bool = False
    sinks: bool = False
    query_scaling: QueryScaling | None = None
    num_heads: int | None = None
    out_bias: bool = False
    differential: float | None = None
    head_dim: int | None = None
    num_kv_heads: int | None = None
    value_norm: bool = False
    keys_as_values: bool = False
    dynamic_mask: bool = False


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

    kv_rank: int
    q_rank: int | None
    nope_dim: int
    rope_dim: int
    value_dim: int
    norm_eps: float = 1e-6
    q_scale: float = 1.0
    kv_scale: float = 1.0


@dataclasses.dataclass(frozen=True)
class HeadTransform:
    """Dense layer, activation and norm before the output projection (BERT, Devlin et al. 2019, arXiv:1810.04805).

    Attributes:
      activation: after the dense layer.
      size: its width, which the output projection then has; None is the embeddings'.
      bias: whether the dense layer has one.
    """

    activation: str
    size: int | None = None
    bias: bool = True


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

    num_experts: int
    experts_per_token: int
    intermediate_size: int
    layers: tuple[int, ...] | None = None
    score: ExpertScore = "softmax"
    sparsemixer_threshold: float = 0.0
    renormalise: bool = True
    scale: float = 1.0
    correction: Correction = "none"
    groups: int = 1
    groups_kept: int = 1
    group_score: GroupScore = "top2"
    router_bias: bool = False
    expert_bias: bool = False
    router_softcap: float | None = None
    scale_input: bool = False
    shared_size: int = 0
    shared_scale: float = 1.0
    shared_gate: bool = False
    output_norm: bool = False
    output_bias: bool = False

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


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Architecture of a decoder-only language model, as orthogonal flags.

    Attributes:
      model_type: name of the family it was converted from; provenance only, the model never reads it.
      extra_tokens: token ids beyond the vocabulary: they have an embedding, and no logit.
      embedding_size: width of the embeddings where it differs from the layers'; projections join the two.
      attention_types: the distinct kinds of attention in the model.
      attention_pattern: index into `attention_types` for each layer.
      norm: "rms" (RMSNorm) or "layer" (LayerNorm).
      layer_norm_eps: added to the mean square by the layers' norms where it is not `norm_eps`.
      norm_scale, norm_bias: whether norms have learned ones.
      norm_unit_offset: norms multiply by ``1 + scale`` instead of ``scale``.
      norm_placement: norms "pre" each sublayer, "post" it (before the residual add), both ("sandwich"), or after the
        "residual" add.
      first_norm: whether the first layer's attention reads its input through a norm, too.
      final_norm: whether there is one before the head.
      embedding_norm: whether embeddings are normed before the first layer.
      positions_after_norm: learned and sinusoidal positions are added after that norm.
      project_after_norm: embeddings of another width are projected last, with a bias: positions, added vectors and
        `embedding_norm` have `embedding_size` too.
      added_embeddings: learned vectors that are added to every token's embedding: a segment's, a task's.
      parallel_residual: attention and MLP both read the layer's input and are added to it together.
      shared_norm: with `parallel_residual`, they read it through one norm.
      residual_scale: multiplies what a sublayer adds to the residual stream.
      layer_scale: a learned number multiplies what a layer returns.
      residual_weights: a learned vector multiplies the residual stream before a sublayer's output is added.
      positions: "rope" and "none" leave embeddings alone; "learned" and "sinusoidal" add a vector for each position.
      position_offset: added to a token's position before its vector is looked up or computed.
      sinusoid_endpoint: the lowest of the sinusoids' frequencies is 1 / 10000 itself, as in fairseq, instead of the
        last one above it.
      learned_positions: rows of the learned position table when `positions` is "learned".
      latent: multi-head latent attention instead of plain heads of keys and values.
      attention_experts: queries and output projections of the attention are experts; heads are as many as those of
        keys and values times the experts of a token.
      attention_gate: each "head" or each "channel" of the attention's output is multiplied by a function of a learned
        projection of its input.
      gate_activation: that function.
      gate_bias: each head has a bias inside of it.
      key_bias: keys have a bias where queries and values have.
      value_dim: channels of a head's value where they are not its key's; values have a projection of their own then.
      value_scale: multiplies values.
      clip_qkv: queries, keys and values are clamped to plus or minus this.
      mlp_gated: ``down(act(gate x) * up x)`` instead of ``down(act(up x))``.
      activation_limit: clamps what enters a gated activation.
      sub_norm: a norm before the attention's and the MLP's output projection (Wang et al. 2022, arXiv:2210.06423).
      embedding_scale: multiplies token embeddings (rounded to the embedding's dtype first).
      head_transform: what states go through before the output projection, None for nothing.
      logit_scale: multiplies logits, before the softcap.
      attention_softcap, logit_softcap: ``cap * tanh(x / cap)`` on attention scores and logits.
      eos_token_ids, pad_token_id: from the checkpoint's generation configuration; defaults of `generate`.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    max_positions: int
    attention_types: tuple[AttentionType, ...]
    attention_pattern: tuple[int, ...]
    extra_tokens: int = 0
    embedding_size: int | None = None
    norm: NormKind = "rms"
    norm_eps: float = 1e-6
    layer_norm_eps: float | None = None
    norm_scale: bool = True
    norm_bias: bool = False
    norm_unit_offset: bool = False
    norm_placement: NormPlacement = "pre"
    first_norm: bool = True
    final_norm: bool = True
    embedding_norm: bool = False
    positions_after_norm: bool = False
    project_after_norm: bool = False
    added_embeddings: int = 0
    parallel_residual: bool = False
    shared_norm: bool = False
    residual_scale: float = 1.0
    residual_weights: bool = False
    layer_scale: bool = False
    positions: Positions = "rope"
    position_offset: int = 0
    sinusoid_endpoint: bool = False
    learned_positions: int = 0
    latent: LatentConfig | None = None
    qkv_bias: bool = False
    key_bias: bool = True
    attention_out_bias: bool = False
    attention_experts: MoEConfig | None = None
    attention_gate: AttentionGate = "none"
    gate_activation: GateActivation = "sigmoid"
    gate_bias: bool = False
    value_dim: int | None = None
    value_scale: float = 1.0
    clip_qkv: float | None = None
    attention_softcap: float | None = None
    activation: str = "silu"
    activation_limit: float | None = None
    mlp_gated: bool = True
    mlp_bias: bool = False
    moe: MoEConfig | None = None
    sub_norm: bool = False
    embedding_scale: float | None = None
    head_transform: HeadTransform | None = None
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    tie_embeddings: bool = True
    head_bias: bool = False
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        check_choice("norm", self.norm, NormKind)
        check_choice("norm_placement", self.norm_placement, NormPlacement)
        check_choice("positions", self.positions, Positions)
        check_choice("attention_gate", self.attention_gate, AttentionGate)
        check_choice("gate_activation", self.gate_activation, GateActivation)
        if len(self.attention_pattern) != self.num_layers:
            raise TideError(
                f"attention_pattern has {len(self.attention_pattern)} entries, expected one for each of the "
                f"{self.num_layers} layers"
            )
        if self.num_kv_heads <= 0 or self.num_heads % self.num_kv_heads:
            raise TideError(
                f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}; "
                "check the checkpoint's config.json"
            )

    def attention(self, layer: int) -> AttentionType:
        """The attention type of one layer."""
        return self.attention_types[self.attention_pattern[layer]]

    def has_experts(self, layer: int) -> bool:
        """Whether a layer has a mixture of experts in place of an MLP."""
        return self.moe is not None and (self.moe.layers is None or layer in self.moe.layers)

    @property
    def head_size(self) -> int:
        """Width of what the output projection reads."""
        own = self.head_transform.size if self.head_transform is not None else None
        return own or self.embedding_size or self.hidden_size

    @property
    def cache_shape(self) -> tuple[int, int, int]:
        """Heads, key channels and value channels a token takes in a layer's cache.

        Latent attention caches its latent vector and the shared rotated key as one head; its values are the former.
        """
        if self.latent is not None:
            return 1, self.latent.kv_rank + self.latent.rope_dim, 0
        heads = max(kind.num_kv_heads or self.num_kv_heads for kind in self.attention_types)
        channels = max(kind.head_dim or self.head_dim for kind in self.attention_types)
        return heads, channels, self.value_dim or channels

    @property
    def context_length(self) -> int:
        """Tokens the model can attend over: `max_positions`, stretched where dynamic rotary scaling allows more."""
        stretch = [t.rope.factor for t in self.attention_types if t.rope and t.rope.kind == "dynamic"]
        return int(self.max_positions * max(stretch, default=1.0))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-ready values; `from_dict` reads them back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> DecoderConfig:
        """Inverse of `to_dict`. Raises TideError for unknown or missing fields."""
        try:
            return _build(cls, values)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            if isinstance(error, TideError):
                raise
            raise TideError(
                f"decoder configuration not understood ({error}); it was written by another version of tide_jax: "
                "convert the checkpoint again"
            ) from error


_hints = functools.cache(typing.get_type_hints)


def _build(kind: Any, value: Any) -> Any:
    """A value read from JSON as the annotated type: nested dataclasses and tuples."""
    if isinstance(kind, types.UnionType):
        return None if value is None else _build(get_args(kind)[0], value)
    if typing.get_origin(kind) is tuple:
        return tuple(_build(get_args(kind)[0], item) for item in value)
    if dataclasses.is_dataclass(kind):
        hints = _hints(kind)
        return typing.cast(Any, kind)(**{name: _build(hints.get(name), item) for name, item in value.items()})
    return value
