"""Ranges of an architecture's numbers, as types: `Layers` is an int from 1 to `MOST_LAYERS`, and so on.

To Python they are plain int and float; `pydantic` checks the ranges, see `tide_jax.records`. Upper bounds are far above
every published model, and low enough to refuse a damaged file before memory is allocated for it.
"""

from __future__ import annotations

from typing import Annotated

from annotated_types import Interval

MOST_LAYERS = 4096  # published: 126 (Llama 3.1 405B)
MOST_TOKENS = 2**24  # published: one million
MOST_HEADS = 2**16
MOST_CHANNELS = 2**24  # hidden widths: published up to 2**18
MOST_EXPERTS = 2**16
MOST_POSITIONS = 2**31 - 1  # positions are int32

Layers = Annotated[int, Interval(ge=1, le=MOST_LAYERS)]
LayerIndex = Annotated[int, Interval(ge=0, lt=MOST_LAYERS)]
Tokens = Annotated[int, Interval(ge=1, le=MOST_TOKENS)]
TokenId = Annotated[int, Interval(ge=0, lt=MOST_TOKENS)]
Heads = Annotated[int, Interval(ge=1, le=MOST_HEADS)]
Channels = Annotated[int, Interval(ge=1, le=MOST_CHANNELS)]
ChannelsOrZero = Annotated[int, Interval(ge=0, le=MOST_CHANNELS)]
Experts = Annotated[int, Interval(ge=1, le=MOST_EXPERTS)]
ExpertsOrZero = Annotated[int, Interval(ge=0, le=MOST_EXPERTS)]
PositionCount = Annotated[int, Interval(ge=1, le=MOST_POSITIONS)]
PositionsOrZero = Annotated[int, Interval(ge=0, le=MOST_POSITIONS)]
Positive = Annotated[float, Interval(ge=1e-30, le=1e30)]  # float32 represents it and its inverse
NotNegative = Annotated[float, Interval(ge=0, le=1e30)]
Number = Annotated[float, Interval(ge=-1e30, le=1e30)]
Theta = Annotated[float, Interval(ge=1, le=1e15)]
Epsilon = Annotated[float, Interval(ge=0, le=1)]
