"""Configuration: what a decoder is, when tokens exit, how routers are trained.

Every class here is a frozen, hashable dataclass of plain Python values, so it can be a static argument of
``jax.jit`` and can be written to JSON. A model family is a point in the space of `DecoderConfig`'s flags; nothing
in the model asks which family it is.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any, Literal, get_args

from tide_jax.checks import real_number, share, whole_number
from tide_jax.errors import TideError

Norm = Literal["rms", "layer"]
NormPlacement = Literal["pre", "post", "sandwich"]
Positions = Literal["rope", "learned", "none"]
RopeKind = Literal["default", "linear", "dynamic", "llama3", "yarn", "longrope"]
ExitStrategy = Literal["identity", "affine"]
KVStrategy = Literal["propagate"]
Label = Literal["agreement", "cosine"]
Mode = Literal["exit", "full"]


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
      short_factor, long_factor: per-frequency divisors of "longrope", ``rotary_dim // 2`` each.
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
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()


@dataclasses.dataclass(frozen=True)
class AttentionType:
    """What may differ between the attention of one layer and the next.

    Attributes:
      scale: multiplies query-key products.
      window: tokens a query sees, itself included; None is all of them.
      rope: rotary embedding, None for none.
    """

    scale: float
    window: int | None = None
    rope: RopeConfig | None = None


@dataclasses.dataclass(frozen=True)
class MoEConfig:
    """Mixture of experts: softmax router, the best `experts_per_token` of `num_experts`, gates renormalised."""

    num_experts: int
    experts_per_token: int


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Architecture of a decoder-only language model, as orthogonal flags.

    Attributes:
      model_type: name of the family it was converted from; provenance only, the model never reads it.
      attention_types: the distinct kinds of attention in the model.
      attention_pattern: index into `attention_types` for each layer.
      norm: "rms" (RMSNorm) or "layer" (LayerNorm).
      norm_unit_offset: norms multiply by ``1 + scale`` instead of ``scale``.
      norm_placement: norms "pre" each sublayer, "post" it (before the residual add), or both ("sandwich").
      parallel_residual: attention and MLP both read the layer's input and are added to it together.
      qk_norm: queries and keys are RMS-normed per head before rotation.
      mlp_gated: ``down(act(gate x) * up x)`` instead of ``down(act(up x))``.
      embedding_scale: multiplies token embeddings (rounded to the embedding's dtype first).
      attention_softcap, logit_softcap: ``cap * tanh(x / cap)`` on attention scores and logits.
      learned_positions: rows of the learned position table when `positions` is "learned".
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
    norm: Norm = "rms"
    norm_eps: float = 1e-6
    norm_bias: bool = False
    norm_unit_offset: bool = False
    norm_placement: NormPlacement = "pre"
    parallel_residual: bool = False
    positions: Positions = "rope"
    learned_positions: int = 0
    qkv_bias: bool = False
    attention_out_bias: bool = False
    qk_norm: bool = False
    attention_softcap: float | None = None
    activation: str = "silu"
    mlp_gated: bool = True
    mlp_bias: bool = False
    moe: MoEConfig | None = None
    embedding_scale: float | None = None
    logit_softcap: float | None = None
    tie_embeddings: bool = True
    head_bias: bool = False
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        _check_choice("norm", self.norm, Norm)
        _check_choice("norm_placement", self.norm_placement, NormPlacement)
        _check_choice("positions", self.positions, Positions)
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
            values = dict(values)
            values["attention_types"] = tuple(_attention_type(t) for t in values["attention_types"])
            values["attention_pattern"] = tuple(values["attention_pattern"])
            values["eos_token_ids"] = tuple(values.get("eos_token_ids", ()))
            values["moe"] = MoEConfig(**values["moe"]) if values.get("moe") else None
            return cls(**values)
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, TideError):
                raise
            raise TideError(
                f"decoder configuration not understood ({error}); it was written by another version of tide_jax: "
                "convert the checkpoint again"
            ) from error


def _attention_type(values: dict[str, Any]) -> AttentionType:
    values = dict(values)
    if rope := values.get("rope"):
        fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in rope.items()}
        values["rope"] = RopeConfig(**fields)
    return AttentionType(**values)


def _check_choice(name: str, value: object, choices: Any) -> None:
    if value not in get_args(choices):
        raise TideError(f"{name}={value!r} is not known; choose one of {', '.join(get_args(choices))}")


@dataclasses.dataclass(frozen=True)
class ExitConfig:
    """When a token may leave the decoder early. Changing any field but `kv_strategy` never recompiles.

    Attributes:
      exit_threshold: a token exits at the first checkpoint whose router score exceeds it, in [0, 1]; one number,
        or one for each checkpoint.
      min_layers: layers every token runs, at the least.
      kv_strategy: how the cache of skipped layers is filled: "propagate" projects keys and values from the exit
        state with the token's true position (CALM, Schuster et al. 2022, section 3.3).
      prefill_exits: let prompt tokens exit too. By default the prompt runs at full depth.
    """

    exit_threshold: float | tuple[float, ...] = 0.85
    min_layers: int = 8
    kv_strategy: KVStrategy = "propagate"
    prefill_exits: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.exit_threshold, (tuple, list)):
            thresholds = tuple(share("exit_threshold", value) for value in self.exit_threshold)
            object.__setattr__(self, "exit_threshold", thresholds)
        else:
            object.__setattr__(self, "exit_threshold", share("exit_threshold", self.exit_threshold))
        object.__setattr__(self, "min_layers", whole_number("min_layers", self.min_layers))
        if not isinstance(self.prefill_exits, bool):
            raise TideError(f"prefill_exits={self.prefill_exits!r} must be True or False")
        _check_choice("kv_strategy", self.kv_strategy, KVStrategy)


@dataclasses.dataclass(frozen=True)
class CalibrationConfig:
    """How routers and exit heads are fitted to a frozen model.

    Attributes:
      checkpoint_interval: a router sits after every this many layers, never after the last.
      calibration_samples: texts to read at the most.
      max_length: tokens read of each text.
      batch_size: texts in a forward pass.
      router_bottleneck_dim: hidden width of the router's MLP.
      exit_strategy: "identity" reads the exit state as it is; "affine" maps it with a fitted affine head first.
      exit_head_rank: rank of the affine heads' correction to the identity; None is full rank.
      label: a token counts as exitable where the exit's argmax equals the full model's ("agreement"), or where the
        exit state's cosine with the last state exceeds `convergence_threshold` ("cosine", the TIDE paper's).
      reservoir_bytes: memory for sampled hidden states; more text than fits is sampled uniformly.
      exit_threshold, min_layers: dial for which the report states expected exits.
      seed: everything random follows from it.
    """

    checkpoint_interval: int = 4
    calibration_samples: int = 2000
    max_length: int = 256
    batch_size: int = 8
    router_bottleneck_dim: int = 128
    exit_strategy: ExitStrategy = "affine"
    exit_head_rank: int | None = None
    label: Label = "agreement"
    convergence_threshold: float = 0.98
    reservoir_bytes: int = 512 * 2**20
    validation_fraction: float = 0.15
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    max_epochs: int = 30
    patience: int = 4
    exit_threshold: float = 0.85
    min_layers: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        _check_choice("exit_strategy", self.exit_strategy, ExitStrategy)
        _check_choice("label", self.label, Label)
        least = {"max_length": 2, "min_layers": 0, "patience": 0, "seed": 0}  # of a text, position 0 is left out
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type == "int" or (field.type == "int | None" and value is not None):
                whole_number(field.name, value, least.get(field.name, 1), 2**63 - 1)
        for name in ("convergence_threshold", "exit_threshold"):
            share(name, getattr(self, name))
        if not 0.0 < share("validation_fraction", self.validation_fraction) < 1.0:
            raise TideError(f"validation_fraction={self.validation_fraction!r} must lie between 0 and 1")
        for name in ("learning_rate", "weight_decay"):
            if not 0.0 <= real_number(name, getattr(self, name)) < float("inf"):
                raise TideError(f"{name}={getattr(self, name)!r} must be 0 or more")


def checkpoint_layers(num_layers: int, interval: int) -> tuple[int, ...]:
    """0-based layers that carry a router: every `interval`-th, never the last (nothing is left to skip there).

    >>> checkpoint_layers(8, 4)
    (3,)
    >>> checkpoint_layers(10, 4)
    (3, 7)
    """
    return tuple(range(interval - 1, num_layers - 1, interval))


def layer_groups(num_layers: int, checkpoints: tuple[int, ...]) -> tuple[range, ...]:
    """The layers between two checkpoints, in order: the units that can be skipped.

    >>> layer_groups(6, (1, 3))
    (range(0, 2), range(2, 4), range(4, 6))
    """
    edges = [0, *(c + 1 for c in checkpoints), num_layers]
    return tuple(range(a, b) for a, b in itertools.pairwise(edges))
