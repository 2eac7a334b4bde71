"""The architecture of a decoder, as orthogonal flags.

All classes here and in `tide_jax.model.architecture_parts` are frozen, hashable dataclasses of plain Python values. So
they can be static arguments of ``jax.jit``, and they can be written to JSON. A model family is a point in the space of
`DecoderConfig`'s flags; nothing in the model asks which family it is.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from tide_jax.errors import TideError, join_problems, shorten
from tide_jax.model.architecture_parts import (
    AddScales,
    AttentionType,
    GatedActivation,
    HeadTransform,
    LatentConfig,
    MoEConfig,
    NormKind,
    QKNorm,
    QueryScaling,
    RopeConfig,
    UngatedActivation,
    check_choice,
    check_multiple,
)
from tide_jax.model.generation_settings import NOTHING_SAID, GenerationSettings
from tide_jax.model.recurrent.types import RecurrentType
from tide_jax.ranges import (
    Channels,
    Epsilon,
    Heads,
    LayerIndex,
    Layers,
    PositionCount,
    PositionsOrZero,
    Positive,
    TokenId,
    Tokens,
)
from tide_jax.records import STRICT, from_json, instance_problems, json_problems

__all__ = [
    "AddScales",
    "AttentionType",
    "DecoderConfig",
    "HeadTransform",
    "LatentConfig",
    "MoEConfig",
    "NormKind",
    "QKNorm",
    "QueryScaling",
    "RopeConfig",
    "check_choice",
]

NormPlacement = Literal["pre", "post", "sandwich", "residual"]
Positions = Literal["rope", "learned", "sinusoidal", "none"]
AttentionGate = Literal["none", "head", "channel"]
GateActivation = Literal["sigmoid", "softplus"]
Carried = Literal["nothing", "embedding", "shortcut"]


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Architecture of a decoder-only language model, as orthogonal flags.

    Attributes:
      model_type: name of the family the model was converted from. Provenance only: the model never reads it.
      recurrent_types: the distinct kinds of layers that keep a state of fixed size instead of keys and values.
      beside_attention: index into `recurrent_types` of the layer that runs beside the attention of every layer that has
        attention. Both read the same input, and their outputs are added. None for none.
      mlp_layers: layers with a feed-forward block; None for all.
      carried: what the residual stream carries beside itself, in `hidden_size` more channels. "embedding": each token's
        embedding. Attention with a recurrent layer beside it then reads the stream and the embedding. The attention's
        output runs through a feed-forward block of its own and is added to the recurrent layer's input only (Zamba,
        Glorioso et al. 2024, arXiv:2405.16712, section 2). "shortcut": the output of a layer's experts. They then run
        beside the layer's MLP, and the next layer adds their output to its own (Cai et al. 2024, arXiv:2404.05019).
      extra_tokens: token ids beyond the vocabulary: they have an embedding but no logit.
      embedding_size: width of the embeddings if it differs from the layers' width; projections join the two.
      attention_types: the distinct kinds of attention in the model.
      layer_pattern: for each layer, an index into ``attention_types + recurrent_types``.
      norm: "rms" (RMSNorm) or "layer" (LayerNorm).
      layer_norm_eps: the layers' norms add this to the mean square instead of `norm_eps`.
      norm_scale, norm_bias: whether norms have a learned scale and a learned bias.
      norm_unit_offset: norms multiply by ``1 + scale`` instead of ``scale``.
      norm_placement: norms come before each sublayer ("pre"), after it but before the residual add ("post"), both
        ("sandwich"), or after the residual add ("residual").
      recurrent_norms: the same for layers without attention, None for `norm_placement`.
      norm_gate_rank: the norms before attention and before experts multiply their output by a gate, the sigmoid of a
        function of that rank of the output itself; None for none.
      first_norm: whether the first layer normalises the input of its attention too.
      final_norm: whether a norm precedes the head.
      embedding_norm: whether embeddings are normed before the first layer.
      positions_after_norm: learned and sinusoidal positions are added after that norm.
      project_after_norm: if `embedding_size` is set, the projection to the layers' width comes last and has a bias.
        Positions, added vectors and `embedding_norm` then have `embedding_size` too.
      added_embeddings: number of learned vectors that are added to every token's embedding, such as a segment's or a
        task's.
      parallel_residual: attention and MLP both read the layer's input, and both outputs are added to it.
      shared_norm: with `parallel_residual`, attention and MLP share one norm.
      residual_scale: multiplies each sublayer's output before the residual add.
      stream_scale: multiplies the residual stream before a sublayer's output is added.
      recurrent_scales, mlp_scales: the same two for layers without attention, and for feed-forward blocks; None for
        `residual_scale` and `stream_scale`.
      normed_residual: a sublayer's output is added to its normed input instead of the residual stream.
      layer_scale: a learned number multiplies each layer's output.
      residual_weights: a learned vector multiplies the residual stream before a sublayer's output is added.
      positions: "rope" and "none" add nothing to embeddings; "learned" and "sinusoidal" add a vector for each position.
      position_offset: added to a token's position before its vector is looked up or computed.
      sinusoid_endpoint: the sinusoids' lowest frequency is exactly 1 / 10000, as in fairseq. Otherwise the series stops
        one step above it.
      learned_positions: rows of the learned position table when `positions` is "learned".
      latent: multi-head latent attention instead of plain heads of keys and values.
      attention_experts: queries and output projections of the attention are experts. The number of heads is then the
        number of key-value heads times the experts per token.
      attention_gate: a gate multiplies each "head" or each "channel" of the attention's output. The gate is a function
        of a learned projection of the attention's input.
      gate_activation: that function.
      gate_bias: each head or channel adds a bias before that function.
      key_bias: keys have a bias if queries and values do.
      value_dim: channels of a head's value if they differ from its key's; values then have their own projection.
      value_scale: multiplies values.
      clip_qkv: clamps queries, keys and values to plus or minus this.
      mlp_gated: ``down(act(gate x) * up x)`` instead of ``down(act(up x))``.
      mlp_gate_scale: multiplies ``gate x``.
      activation_limit: clamps the inputs of a gated activation.
      sub_norm: a norm before the output projections of attention and MLP (Wang et al. 2022, arXiv:2210.06423).
      embedding_scale: multiplies token embeddings; it is rounded to the embedding's dtype first.
      head_transform: layers between the final norm and the output projection; None for none.
      logit_scale: multiplies logits, before the softcap.
      attention_softcap, logit_softcap: ``cap * tanh(x / cap)`` on attention scores and logits.
      eos_token_ids, pad_token_id, generation: from the checkpoint's generation configuration; defaults of `generate`.
    """

    model_type: str
    vocab_size: Tokens
    hidden_size: Channels
    num_layers: Layers
    num_heads: Heads
    num_kv_heads: Heads
    head_dim: Channels
    intermediate_size: Channels
    max_positions: PositionCount
    attention_types: tuple[AttentionType, ...]
    layer_pattern: tuple[LayerIndex, ...]
    recurrent_types: tuple[RecurrentType, ...] = ()
    beside_attention: LayerIndex | None = None
    mlp_layers: tuple[LayerIndex, ...] | None = None
    carried: Carried = "nothing"
    extra_tokens: TokenId = 0
    embedding_size: Channels | None = None
    norm: NormKind = "rms"
    norm_eps: Epsilon = 1e-6
    layer_norm_eps: Epsilon | None = None
    norm_scale: bool = True
    norm_bias: bool = False
    norm_unit_offset: bool = False
    norm_placement: NormPlacement = "pre"
    recurrent_norms: NormPlacement | None = None
    norm_gate_rank: Channels | None = None
    first_norm: bool = True
    final_norm: bool = True
    embedding_norm: bool = False
    positions_after_norm: bool = False
    project_after_norm: bool = False
    added_embeddings: TokenId = 0
    parallel_residual: bool = False
    shared_norm: bool = False
    residual_scale: Positive = 1.0
    stream_scale: Positive = 1.0
    recurrent_scales: AddScales | None = None
    mlp_scales: AddScales | None = None
    normed_residual: bool = False
    residual_weights: bool = False
    layer_scale: bool = False
    positions: Positions = "rope"
    position_offset: TokenId = 0
    sinusoid_endpoint: bool = False
    learned_positions: PositionsOrZero = 0
    latent: LatentConfig | None = None
    qkv_bias: bool = False
    key_bias: bool = True
    attention_out_bias: bool = False
    attention_experts: MoEConfig | None = None
    attention_gate: AttentionGate = "none"
    gate_activation: GateActivation = "sigmoid"
    gate_bias: bool = False
    value_dim: Channels | None = None
    value_scale: Positive = 1.0
    clip_qkv: Positive | None = None
    attention_softcap: Positive | None = None
    activation: str = "silu"
    activation_limit: Positive | None = None
    mlp_gated: bool = True
    mlp_gate_scale: Positive = 1.0
    mlp_bias: bool = False
    moe: MoEConfig | None = None
    sub_norm: bool = False
    embedding_scale: Positive | None = None
    head_transform: HeadTransform | None = None
    logit_scale: Positive = 1.0
    logit_softcap: Positive | None = None
    tie_embeddings: bool = True
    head_bias: bool = False
    eos_token_ids: tuple[TokenId, ...] = ()
    pad_token_id: TokenId | None = None
    generation: GenerationSettings = NOTHING_SAID

    __pydantic_config__ = STRICT

    def __post_init__(self) -> None:
        check_choice("norm", self.norm, NormKind)
        check_choice("norm_placement", self.norm_placement, NormPlacement)
        check_choice("recurrent_norms", self.recurrent_norms or self.norm_placement, NormPlacement)
        check_choice("positions", self.positions, Positions)
        check_choice("attention_gate", self.attention_gate, AttentionGate)
        check_choice("gate_activation", self.gate_activation, GateActivation)
        check_choice("carried", self.carried, Carried)
        self._check_carried()
        gated_activation = self.mlp_gated or (self.moe is not None and self.moe.gated)
        check_choice("activation", self.activation, GatedActivation if gated_activation else UngatedActivation)
        if len(self.layer_pattern) != self.num_layers:
            raise TideError(
                f"layer_pattern has {len(self.layer_pattern)} entries, expected one for each of the "
                f"{self.num_layers} layers"
            )
        if max(self.layer_pattern, default=0) >= len(self.layer_types):
            raise TideError(
                f"layer_pattern names layer type {max(self.layer_pattern)}, expected one of the "
                f"{len(self.layer_types)} in attention_types and recurrent_types, counted from 0"
            )
        if self.beside_attention is not None and self.beside_attention >= len(self.recurrent_types):
            raise TideError(
                f"beside_attention={self.beside_attention} names no recurrent type, expected one of the "
                f"{len(self.recurrent_types)} in recurrent_types, counted from 0"
            )
        if max(self.mlp_layers or (), default=0) >= self.num_layers:
            raise TideError(
                f"mlp_layers names layer {max(self.mlp_layers or ())}, expected layers below {self.num_layers}"
            )
        check_multiple("num_heads", self.num_heads, "num_kv_heads", self.num_kv_heads)

    def _check_carried(self) -> None:
        """Raises TideError if nothing reads what the stream carries, or if what reads it is of another kind."""
        if self.carried == "embedding" and (self.beside_attention is None or self.latent or self.attention_experts):
            raise TideError(
                'carried="embedding" is for plain attention beside a recurrent layer: expected beside_attention, and '
                "neither latent nor attention_experts"
            )
        if self.carried != "shortcut":
            return
        if self.moe is None or self.moe.layers is None:
            raise TideError('carried="shortcut" is for experts that are in some layers: expected moe with layers')
        sparse = self.moe.layers
        if next_too := [i for i in sparse if i + 1 in sparse or i + 1 >= self.num_layers]:
            raise TideError(
                f'carried="shortcut" with experts in layer {next_too[0]}: expected a next layer without experts, which '
                "adds their output"
            )

    @property
    def layer_types(self) -> tuple[AttentionType | RecurrentType, ...]:
        """What `layer_pattern` names."""
        return (*self.attention_types, *self.recurrent_types)

    def layer_type(self, layer: int) -> AttentionType | RecurrentType:
        """The attention type or recurrent type of a layer."""
        return self.layer_types[self.layer_pattern[layer]]

    def recurrent_beside(self, layer: int) -> RecurrentType | None:
        """What runs beside a layer's attention."""
        beside = self.beside_attention
        attends = isinstance(self.layer_type(layer), AttentionType)
        return self.recurrent_types[beside] if beside is not None and attends else None

    def norms_of(self, layer: int) -> NormPlacement:
        """Where a layer's norms are."""
        attends = isinstance(self.layer_type(layer), AttentionType)
        return self.norm_placement if attends else self.recurrent_norms or self.norm_placement

    def add_scales(self, layer: int) -> AddScales:
        """How the output of a layer's attention or recurrent layer joins the residual stream."""
        attends = isinstance(self.layer_type(layer), AttentionType)
        usual = AddScales(self.stream_scale, self.residual_scale)
        return usual if attends else self.recurrent_scales or usual

    @property
    def mlp_add_scales(self) -> AddScales:
        """How the output of a feed-forward block joins the residual stream."""
        return self.mlp_scales or AddScales(self.stream_scale, self.residual_scale)

    def has_mlp(self, layer: int) -> bool:
        """Whether a layer has a feed-forward block."""
        return self.mlp_layers is None or layer in self.mlp_layers

    def has_experts(self, layer: int) -> bool:
        """Whether a layer has a mixture of experts in place of an MLP."""
        return self.moe is not None and (self.moe.layers is None or layer in self.moe.layers)

    def has_shortcut(self, layer: int) -> bool:
        """Whether a layer's experts run beside its MLP, for the next layer to add their output."""
        return self.carried == "shortcut" and self.has_experts(layer)

    @property
    def stream_size(self) -> int:
        """Channels of the residual stream, with what it carries."""
        return self.hidden_size if self.carried == "nothing" else 2 * self.hidden_size

    @property
    def attention_inputs(self) -> int:
        """Channels that attention reads."""
        return self.stream_size if self.carried == "embedding" else self.hidden_size

    @property
    def head_size(self) -> int:
        """Input width of the output projection."""
        own = self.head_transform.size if self.head_transform is not None else None
        return own or self.embedding_size or self.hidden_size

    @property
    def cache_shape(self) -> tuple[int, int, int]:
        """Heads, key channels and value channels that one token occupies in the cache of a layer with attention.

        Latent attention caches its latent vector and the shared rotated key as the key of one head. Its values are the
        latent vectors, so it stores no values. Where layers differ, the largest shape serves all.
        """
        if self.latent is not None:
            latents = [kind.latent or self.latent for kind in self.attention_types]
            return 1, max(latent.kv_rank + latent.rope_dim for latent in latents), 0
        if not self.attention_types:
            return 0, 0, 0
        heads = max(kind.num_kv_heads or self.num_kv_heads for kind in self.attention_types)
        channels = max(kind.head_dim or self.head_dim for kind in self.attention_types)
        return heads, channels, self.value_dim or channels

    @property
    def context_length(self) -> int:
        """Tokens that the model can attend over: `max_positions`, or more with dynamic rotary scaling."""
        stretch = [t.rope.factor for t in self.attention_types if t.rope and t.rope.kind == "dynamic"]
        return int(self.max_positions * max(stretch, default=1.0))

    @property
    def length_changes_rope(self) -> bool:
        """Whether rotary frequencies depend on the current length of the row."""
        ropes = (kind.rope for kind in self.attention_types)
        return any(rope is not None and rope.kind in ("dynamic", "longrope") for rope in ropes)

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-ready values; `from_dict` reads them back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> DecoderConfig:
        """Inverse of `to_dict`.

        Raises:
          TideError: a field is unknown or missing, or has a wrong type or range, or fields contradict each other.
        """
        if problems := json_problems(cls, values):
            wrong = shorten(join_problems(problems), 160)
            raise TideError(f"{wrong}: damaged, or of another version of tide_jax, convert the checkpoint again")
        return from_json(cls, values)

    def check(self) -> None:
        """Checks the type and range of every field. Raises TideError, which names the first wrong ones."""
        if problems := instance_problems(self):
            raise TideError(shorten(join_problems(problems), 160))
