"""Generation that ends at stop strings: what a token sequence spells is only known on the host."""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from typing import Any, NamedTuple

from tide_jax.engine import TIDE

_MARGIN = 2  # tokens that the stop string's first and last characters may share with other text


class Continued(NamedTuple):
    """New tokens of one prompt, an end-of-sequence token included, and the last layer run to predict each."""

    tokens: list[int]
    exit_layers: list[int]


class Stops(NamedTuple):
    """What ends a row.

    Attributes:
      until: stop strings; they are part of the returned tokens, cut them from the text.
      decode: text of token ids, in which stop strings are looked for. Where a stop string may be a special token, it
        has to spell those.
      tokens: ids that end a row, too, as the model's end-of-sequence ids do.
    """

    until: Sequence[str]
    decode: Callable[[list[int]], str]
    tokens: Set[int] = frozenset()

    def end(self, tokens: list[int]) -> bool:
        """Whether the newest token ends the row."""
        return tokens[-1] in self.tokens or self._spelled(tokens)

    def _spelled(self, tokens: list[int]) -> bool:
        """Whether the text holds a stop string, which the newest token would have completed."""
        stops = [stop for stop in self.until if stop]
        if not stops:
            return False
        reach = max(len(stop.encode()) for stop in stops) + _MARGIN  # no token spells less than a byte
        tail = self.decode(tokens[-reach:])
        if not any(stop in tail for stop in stops):
            return False
        text = self.decode(tokens)  # a tail alone may spell otherwise, at its start
        return any(stop in text for stop in stops)


def generate_until(engine: TIDE, prompts: Sequence[Sequence[int]], stops: Stops, **arguments: Any) -> list[Continued]:
    """Continues prompts as one batch until each row's text holds a stop string or its sequence has ended.

    The device goes on while any row is unfinished; what it makes of a finished row is dropped, and neither returned
    nor counted.

    Args:
      stops: what ends a row beside the model's end-of-sequence tokens.
      arguments: of `TIDE.generate`.

    Raises:
      TideError: as `TIDE.generate`.
    """
    rows = [Continued([], []) for _ in prompts]
    unfinished = set(range(len(rows)))
    for step in engine.stream([list(prompt) for prompt in prompts], **arguments):
        for b in sorted(unfinished):
            if step.exit_layers[b] < 0:  # the row had ended
                unfinished.discard(b)
                continue
            rows[b].tokens.append(int(step.tokens[b]))
            rows[b].exit_layers.append(int(step.exit_layers[b]))
            if stops.end(rows[b].tokens):
                unfinished.discard(b)
        if not unfinished:
            break
    return rows
