"""Generation that ends at stop strings: what a token sequence spells is only known on the host."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from tide_jax.engine import TIDE

_MARGIN = 2  # tokens that the stop string's first and last characters may share with other text


class Continued(NamedTuple):
    """New tokens of one prompt, an end-of-sequence token included, and the last layer run to predict each."""

    tokens: list[int]
    exit_layers: list[int]


def generate_until(
    engine: TIDE,
    prompts: Sequence[Sequence[int]],
    until: Sequence[str],
    decode: Callable[[list[int]], str],
    **arguments: Any,
) -> list[Continued]:
    """Continues prompts as one batch until each row's text holds a stop string or its sequence has ended.

    The device goes on while any row is unfinished; what it makes of a finished row is dropped, and neither returned
    nor counted.

    Args:
      until: stop strings; they are part of the returned tokens, cut them from the text.
      decode: text of token ids.
      arguments: of `TIDE.generate`.

    Raises:
      TideError: as `TIDE.generate`.
    """
    stops = [stop for stop in until if stop]
    reach = max((len(stop.encode()) for stop in stops), default=0) + _MARGIN  # no token spells less than a byte
    rows = [Continued([], []) for _ in prompts]
    unfinished = set(range(len(rows)))
    for step in engine.stream([list(prompt) for prompt in prompts], **arguments):
        for b in sorted(unfinished):
            if step.exit_layers[b] < 0:  # the row had ended
                unfinished.discard(b)
                continue
            rows[b].tokens.append(int(step.tokens[b]))
            rows[b].exit_layers.append(int(step.exit_layers[b]))
            if _spells(rows[b].tokens, stops, reach, decode):
                unfinished.discard(b)
        if not unfinished:
            break
    return rows


def _spells(tokens: list[int], stops: list[str], reach: int, decode: Callable[[list[int]], str]) -> bool:
    """Whether the text holds a stop string, which the newest token would have completed."""
    if not stops:
        return False
    tail = decode(tokens[-reach:])
    if not any(stop in tail for stop in stops):
        return False
    text = decode(tokens)  # a tail alone may spell otherwise, at its start
    return any(stop in text for stop in stops)
