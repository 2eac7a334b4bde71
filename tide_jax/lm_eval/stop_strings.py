"""Generation that ends at stop strings, which only the host can find, because it decodes the text."""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from typing import Any, NamedTuple

from tide_jax.engine import TIDE

_MARGIN = 2  # the tokens with the stop string's first and last characters may hold other text too


class Continued(NamedTuple):
    """New tokens of one prompt, including an end-of-sequence token, and the last layer that ran to predict each."""

    tokens: list[int]
    exit_layers: list[int]


class Stops(NamedTuple):
    """Conditions that end a row.

    Attributes:
      until: stop strings. The returned tokens include them; cut them from the text.
      decode: converts token ids to the text that is searched for stop strings. If a stop string may be a special token,
        the text must contain special tokens.
      tokens: ids that also end a row, like the model's end-of-sequence ids.
    """

    until: Sequence[str]
    decode: Callable[[list[int]], str]
    tokens: Set[int] = frozenset()

    def end(self, tokens: list[int]) -> bool:
        """Whether the newest token ends the row."""
        return tokens[-1] in self.tokens or self._spelled(tokens)

    def _spelled(self, tokens: list[int]) -> bool:
        """Whether the text contains a stop string, which the newest token would have completed."""
        stops = [stop for stop in self.until if stop]
        if not stops:
            return False
        reach = max(len(stop.encode()) for stop in stops) + _MARGIN  # every token has at least one byte
        tail = self.decode(tokens[-reach:])
        if not any(stop in tail for stop in stops):
            return False
        text = self.decode(tokens)  # the tail alone may decode differently at its start
        return any(stop in text for stop in stops)


def generate_until(engine: TIDE, prompts: Sequence[Sequence[int]], stops: Stops, **arguments: Any) -> list[Continued]:
    """Continues prompts as one batch until each row's text contains a stop string or its sequence has ended.

    The device continues while any row is unfinished. Tokens of finished rows are dropped: they are neither returned nor
    counted.

    Args:
      stops: conditions that end a row, besides the model's end-of-sequence tokens.
      arguments: arguments of `TIDE.generate`.

    Raises:
      TideError: as `TIDE.generate`.
    """
    rows = [Continued([], []) for _ in prompts]
    unfinished = set(range(len(rows)))
    for step in engine.stream([list(prompt) for prompt in prompts], **arguments):
        for b in sorted(unfinished):
            if step.exit_layers[b] < 0:  # the row has already ended
                unfinished.discard(b)
                continue
            rows[b].tokens.append(int(step.tokens[b]))
            rows[b].exit_layers.append(int(step.exit_layers[b]))
            if stops.end(rows[b].tokens):
                unfinished.discard(b)
        if not unfinished:
            break
    return rows
