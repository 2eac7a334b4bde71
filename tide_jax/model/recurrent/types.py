"""Kinds of recurrent layers, as flags: points in the same space as `tide_jax.model.architecture.DecoderConfig`."""

from __future__ import annotations

import dataclasses
from typing import Literal

from tide_jax.errors import TideError
from tide_jax.model.architecture_parts import PlainActivation, check_choice, check_multiple
from tide_jax.ranges import Channels, Epsilon, Heads, NotNegative, Positive
from tide_jax.records import STRICT


@dataclasses.dataclass(frozen=True)
class StateSizes:
    """Sizes of what a recurrent layer keeps of earlier tokens, and of what one token adds.

    Attributes:
      channels: of the convolution.
      width: tokens of the convolution's window; the newest is not kept. 1 without a convolution.
      matrix: heads, key channels and value channels of the state; zeros for layers that only convolve.
      inputs: numbers that a token gives to the state, the convolution's channels first.
    """

    channels: int
    width: int
    matrix: tuple[int, int, int]
    inputs: int


@dataclasses.dataclass(frozen=True)
class ShortConvType:
    """A gated convolution over a few tokens, without further memory (LFM2, Liquid AI 2025).

    Attributes:
      kind: tag of these types in JSON.
      width: tokens of a filter, the newest included.
      bias: whether the projections and the filters have a bias.
    """

    width: Channels
    bias: bool = False
    kind: Literal["short_conv"] = "short_conv"

    __pydantic_config__ = STRICT

    def sizes(self, hidden_size: int) -> StateSizes:
        """Sizes of the state in a model of some width."""
        return StateSizes(hidden_size, self.width, (0, 0, 0), hidden_size)


@dataclasses.dataclass(frozen=True)
class GatedDeltaType:
    """A gated delta net (Yang et al. 2024, arXiv:2412.06464, section 3.4).

    Attributes:
      kind: tag of these types in JSON.
      key_heads, value_heads: numbers of heads; each key head serves several value heads.
      key_dim, value_dim: channels of a head.
      width: tokens of a filter over queries, keys and values.
      largest_rate: a write replaces at most this much of what its key read; 2 turns its sign (Grazzi et al. 2024,
        arXiv:2411.12537).
      norm_eps: of the norm over each head's output, which a gate multiplies.
    """

    key_heads: Heads
    value_heads: Heads
    key_dim: Channels
    value_dim: Channels
    width: Channels
    largest_rate: Positive = 1.0
    norm_eps: Epsilon = 1e-6
    kind: Literal["gated_delta"] = "gated_delta"

    __pydantic_config__ = STRICT

    def __post_init__(self) -> None:
        check_multiple("value_heads", self.value_heads, "key_heads", self.key_heads)

    def sizes(self, hidden_size: int) -> StateSizes:
        """Sizes of the state in a model of some width."""
        channels = 2 * self.key_heads * self.key_dim + self.value_heads * self.value_dim
        matrix = (self.value_heads, self.key_dim, self.value_dim)
        return StateSizes(channels, self.width, matrix, channels + 2 * self.value_heads)


@dataclasses.dataclass(frozen=True)
class KimiDeltaType:
    """Kimi delta attention (Kimi Team 2025, arXiv:2510.26692, section 3): a delta net whose key channels fade apart.

    Attributes:
      kind: tag of these types in JSON.
      heads, head_dim: heads and their channels, the same for queries, keys and values.
      width: tokens of a filter over queries, keys and values.
      fade_rank, gate_rank: ranks of the projections of fades and of the output's gate, None for full ones.
      fade_limit: a token's fades lie between 0 and minus this; None for no limit.
      norm_eps: of the norm over each head's output, which the gate multiplies.
    """

    heads: Heads
    head_dim: Channels
    width: Channels
    fade_rank: Channels | None = None
    gate_rank: Channels | None = None
    fade_limit: Positive | None = None
    norm_eps: Epsilon = 1e-6
    kind: Literal["kimi_delta"] = "kimi_delta"

    __pydantic_config__ = STRICT

    def sizes(self, hidden_size: int) -> StateSizes:
        """Sizes of the state in a model of some width."""
        inner = self.heads * self.head_dim
        return StateSizes(3 * inner, self.width, (self.heads, self.head_dim, self.head_dim), 4 * inner + self.heads)


@dataclasses.dataclass(frozen=True)
class StateSpaceType:
    """Mamba-2 (Dao & Gu 2024, arXiv:2405.21060, section 7).

    Attributes:
      kind: tag of these types in JSON.
      heads, head_dim: heads of the inner stream and their channels.
      groups: groups of heads that share what is written and read.
      state_size: channels of a group's keys.
      width: tokens of a filter over inner stream, keys and queries.
      conv_bias, bias: whether filters, and projections, have a bias.
      step_limit: least and largest time step.
      norm: whether each group's output is normed after its gate multiplies it, before that, or not at all.
      norm_eps: of that norm.
      scales: multiply the projected gate, inner stream, keys, queries and time steps (Yang et al. 2022, muP).
      output_scale: multiplies the layer's output.
    """

    heads: Heads
    head_dim: Channels
    groups: Heads
    state_size: Channels
    width: Channels
    conv_bias: bool = True
    bias: bool = False
    step_limit: tuple[NotNegative, ...] = (0.0, 1e30)
    norm: Literal["after_gate", "before_gate", "none"] = "after_gate"
    norm_eps: Epsilon = 1e-5
    scales: tuple[Positive, ...] = (1.0, 1.0, 1.0, 1.0, 1.0)
    output_scale: Positive = 1.0
    kind: Literal["state_space"] = "state_space"

    __pydantic_config__ = STRICT

    def __post_init__(self) -> None:
        check_multiple("heads", self.heads, "groups", self.groups)
        if len(self.step_limit) != 2 or self.step_limit[0] > self.step_limit[1]:
            raise TideError(f"step_limit={self.step_limit} must be the least and the largest time step, in this order")
        if len(self.scales) != 5:
            raise TideError(f"scales={self.scales} must be five: of gate, inner stream, keys, queries and time steps")

    def sizes(self, hidden_size: int) -> StateSizes:
        """Sizes of the state in a model of some width."""
        channels = self.heads * self.head_dim + 2 * self.groups * self.state_size
        matrix = (self.heads, self.state_size, self.head_dim)
        return StateSizes(channels, self.width, matrix, channels + self.heads)


@dataclasses.dataclass(frozen=True)
class SelectiveType:
    """Mamba (Gu & Dao 2023, arXiv:2312.00752, section 3): each channel has a small state of its own.

    Attributes:
      kind: tag of these types in JSON.
      inner: channels of the inner stream.
      state_size: numbers in a channel's state.
      step_rank: rank of the time step's projection.
      width: tokens of a filter over the inner stream.
      heads: heads of the inner stream; each makes its time step, keys and queries of its own channels (Glorioso et al.
        2024, arXiv:2405.16712). None for one projection of all channels.
      conv_bias, bias: whether filters, and projections, have a bias.
      norms: whether time step, keys and queries are normed, with or without a learned scale.
      norm_eps: of these norms.
    """

    inner: Channels
    state_size: Channels
    step_rank: Channels
    width: Channels
    heads: Heads | None = None
    conv_bias: bool = True
    bias: bool = False
    norms: Literal["none", "plain", "scaled"] = "none"
    norm_eps: Epsilon = 1e-6
    kind: Literal["selective"] = "selective"

    __pydantic_config__ = STRICT

    def __post_init__(self) -> None:
        check_multiple("inner", self.inner, "heads", self.heads or 1)

    def sizes(self, hidden_size: int) -> StateSizes:
        """Sizes of the state in a model of some width."""
        return StateSizes(self.inner, self.width, (self.inner, self.state_size, 1), self.inner)


@dataclasses.dataclass(frozen=True)
class LightningType:
    """Lightning attention (Qin et al. 2024, arXiv:2401.04658): linear attention whose heads fade at fixed rates.

    Attributes:
      kind: tag of these types in JSON.
      heads, head_dim: numbers of heads and of their channels.
      fade: multiplies the heads' rates of fading, ``2 ** (-8 h / heads)`` for head h, counted from 1.
      norm_eps: of the norm over the outputs of all heads, which a gate multiplies.
    """

    heads: Heads
    head_dim: Channels
    fade: NotNegative = 1.0
    norm_eps: Epsilon = 1e-6
    kind: Literal["lightning"] = "lightning"

    __pydantic_config__ = STRICT

    def sizes(self, hidden_size: int) -> StateSizes:
        """Sizes of the state in a model of some width."""
        inputs = 3 * self.heads * self.head_dim
        return StateSizes(0, 1, (self.heads, self.head_dim, self.head_dim), inputs)


@dataclasses.dataclass(frozen=True)
class RgLruType:
    """A real-gated linear recurrent unit behind a convolution (Griffin, De et al. 2024, arXiv:2402.19427, section 2.4).

    Attributes:
      kind: tag of these types in JSON.
      blocks, block_dim: blocks of channels, each with its own gates, and their channels.
      width: tokens of a filter over all channels.
      activation: of the gate of the output.
    """

    blocks: Heads
    block_dim: Channels
    width: Channels
    activation: str = "gelu_pytorch_tanh"
    kind: Literal["rg_lru"] = "rg_lru"

    __pydantic_config__ = STRICT

    def __post_init__(self) -> None:
        check_choice("activation", self.activation, PlainActivation)

    def sizes(self, hidden_size: int) -> StateSizes:
        """Sizes of the state in a model of some width; each block has one more number, 0 before the first token."""
        inner = self.blocks * self.block_dim
        return StateSizes(inner, self.width, (self.blocks, 1, self.block_dim + 1), inner)


@dataclasses.dataclass(frozen=True)
class MatrixLSTMType:
    """The mLSTM of xLSTM 7B (Beck et al. 2025, arXiv:2503.13427, section 2).

    Attributes:
      kind: tag of these types in JSON.
      heads: number of heads.
      key_dim, value_dim: channels of a head.
      gate_softcap: ``cap * tanh(x / cap)`` on input and forget gates.
      eps: added to the normaliser of what a query reads.
      norm_eps: of the norm over each head's output, which a gate multiplies.
    """

    heads: Heads
    key_dim: Channels
    value_dim: Channels
    gate_softcap: Positive = 15.0
    eps: Epsilon = 1e-6
    norm_eps: Epsilon = 1e-6
    kind: Literal["matrix_lstm"] = "matrix_lstm"

    __pydantic_config__ = STRICT

    def sizes(self, hidden_size: int) -> StateSizes:
        """Sizes of the state in a model of some width; two more value channels hold normaliser and largest exponent."""
        inputs = self.heads * (2 * self.key_dim + self.value_dim + 2)
        return StateSizes(0, 1, (self.heads, self.key_dim, self.value_dim + 2), inputs)


@dataclasses.dataclass(frozen=True)
class TimeMixType:
    """The time mixing of RWKV-4 (Peng et al. 2023, arXiv:2305.13048, section 3.1).

    Attributes:
      kind: tag of these types in JSON.
      inner: channels that each average earlier values.
      mixes_mlp: the layer's feed-forward block is RWKV's channel mixing, which reads the token before, too. The state
        keeps that block's inputs behind the layer's own.
    """

    inner: Channels
    mixes_mlp: bool = False
    kind: Literal["time_mix"] = "time_mix"

    __pydantic_config__ = STRICT

    def sizes(self, hidden_size: int) -> StateSizes:
        """Sizes of the state in a model of some width."""
        inputs = 2 * hidden_size if self.mixes_mlp else hidden_size
        return StateSizes(inputs, 2, (self.inner, 3, 1), inputs)


@dataclasses.dataclass(frozen=True)
class NothingType:
    """No attention and no recurrent layer: the layer is its feed-forward block alone (Nemotron-H).

    Attributes:
      kind: tag of these types in JSON.
    """

    kind: Literal["nothing"] = "nothing"

    __pydantic_config__ = STRICT

    def sizes(self, hidden_size: int) -> StateSizes:
        """Sizes of an empty state."""
        return StateSizes(0, 1, (0, 0, 0), 0)


RecurrentType = (
    NothingType
    | ShortConvType
    | GatedDeltaType
    | KimiDeltaType
    | StateSpaceType
    | SelectiveType
    | LightningType
    | RgLruType
    | TimeMixType
    | MatrixLSTMType
)
