"""Ends rows at stop strings. Only the host can find them, because it decodes the text."""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from typing import Any, NamedTuple

import numpy as np

from tide_jax.errors import TideError
from tide_jax.generation.outputs import StreamStep

_MARGIN = 2  # the tokens with the stop string's first and last characters may hold other text too


class Stops(NamedTuple):
    """Conditions that end a row, besides its end-of-sequence tokens.

    Attributes:
      strings: stop strings. The tokens that complete one stay in the result, as in transformers.
      decode: converts token ids to the text that is searched. If a stop string may be a special token, the text must
        contain special tokens.
      tokens: ids that end a row, too.
    """

    strings: tuple[str, ...]
    decode: Callable[[list[int]], str]
    tokens: Set[int] = frozenset()

    def end(self, tokens: list[int]) -> bool:
        """Whether the newest token ends the row."""
        return tokens[-1] in self.tokens or self._complete(tokens)

    def _complete(self, tokens: list[int]) -> bool:
        """Whether the text contains a stop string, which the newest token would have completed."""
        strings = [string for string in self.strings if string]
        if not strings:
            return False
        reach = max(len(string.encode()) for string in strings) + _MARGIN  # every token has at least one byte
        tail = self.decode(tokens[-reach:])
        if not any(string in tail for string in strings):
            return False
        text = self.decode(tokens)  # the tail alone may decode differently at its start
        return any(string in text for string in strings)


class StopSearch:
    """Follows the new tokens of a batch, and ends rows at stop strings.

    Args:
      stops: what ends a row; None ends none.
      rows: number of rows.
      pad: id in place of tokens after a row's end.
    """

    def __init__(self, stops: Stops | None, rows: int, pad: int) -> None:
        self._stops, self._pad = stops, pad
        self._rows: list[list[int]] = [[] for _ in range(rows)]
        self.ended = np.zeros(rows, bool)

    def cut(self, step: StreamStep) -> StreamStep:
        """The step without tokens of rows that ended before it; marks the rows that it ends."""
        if self._stops is None:
            return step
        step = step._replace(
            tokens=np.where(self.ended, self._pad, step.tokens).astype(np.int32),
            exit_layers=np.where(self.ended, -1, step.exit_layers).astype(np.int32),
        )
        for b in np.flatnonzero(step.exit_layers >= 0):
            self._rows[b].append(int(step.tokens[b]))
            self.ended[b] = self._stops.end(self._rows[b])
        return step


def make_stops(strings: Any, tokenizer: Any) -> Stops | None:
    """Stop conditions from the arguments `stop_strings` and `tokenizer` of `TIDE.generate`; None for no stop strings.

    Raises:
      TideError: `strings` is not a string or a list of strings with text, or no tokenizer was given.
    """
    if isinstance(strings, Stops) or strings is None:
        return strings
    listed = [strings] if isinstance(strings, str) else strings
    if not isinstance(listed, Sequence) or not all(isinstance(string, str) and string for string in listed):
        raise TideError(f"stop_strings={str(strings)[:60]!r} must be a string with text, or a list of such strings")
    if not listed:
        return None
    if not callable(decode := getattr(tokenizer, "decode", None)):
        raise TideError("stop_strings needs tokenizer=, whose decode(ids) gives the text to search")
    return Stops(tuple(listed), decode)
