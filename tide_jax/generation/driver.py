"""Runs checked requests, whole or step by step, whatever the mode.

A mode is a `Decoding`: begin (run the prompt, draw the first token), advance (one pass), and finish. Both modes run in
compiled programs. Without a streamer and without stop strings, one program holds the whole loop.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Int

from tide_jax.errors import TideError
from tide_jax.exits.exits import Exits
from tide_jax.generation.batch import PromptRows, pad_rows
from tide_jax.generation.finite import check_finite
from tide_jax.generation.generate import GenerationState, Prompt, Request, advance, begin, generate_tokens
from tide_jax.generation.outputs import GenerateOutput, StreamStep
from tide_jax.generation.programs import Fixed, Programs
from tide_jax.generation.stats import DraftStats, ExitStats
from tide_jax.generation.stop_strings import Stops, StopSearch
from tide_jax.model.decoder import Decoder
from tide_jax.model.sharding import fetch


class Call(NamedTuple):
    """A checked request, ready for the pure functions.

    `prompt` may have more rows than `rows`: empty rows that pad the batch and do not appear in the result.
    """

    rows: PromptRows
    prompt: Prompt
    request: Request
    exits: Exits | None
    capacity: int
    stops: Stops | None = None

    @property
    def takes_argmax(self) -> bool:
        """Whether every new token is the plain argmax: greedy, without repetition penalty and rules."""
        sampling = self.request.sampling
        plain = float(sampling.temperature) == 0 and float(sampling.repetition_penalty) == 1
        return plain and self.request.rules is None

    @property
    def count(self) -> int:
        """Number of requested rows."""
        return len(self.rows.rows)


class Reading(NamedTuple):
    """What the host reads of a state after a pass, without the rows that pad the batch.

    Attributes:
      tokens: new tokens that were not read before, one column for each step.
      exit_layers: index of the last layer each token ran; -1 for rows that had ended.
      layers: layers that the pass ran.
      done: rows that have ended.
      drafts: draft counters, with ``mode="lossless"``.
    """

    tokens: Int[np.ndarray, "B n"]
    exit_layers: Int[np.ndarray, "B n"]
    layers: int
    done: Bool[np.ndarray, " B"]
    drafts: DraftStats | None = None


@runtime_checkable
class Decoding(Protocol):
    """One way to decode a call: its pure functions as compiled programs, and how to read their results.

    A state has a field `done`, bool, with one entry for each row of the prompt.
    """

    def whole(self, call: Call) -> GenerateOutput:
        """Runs the whole generation in one compiled program."""
        ...

    def begin(self, call: Call) -> Any:
        """Runs the prompts and draws the first tokens: the state to start from."""
        ...

    def advance(self, state: Any, call: Call) -> Any:
        """Runs one pass; overwrites `state`."""
        ...

    def read(self, state: Any, call: Call, start: int) -> Reading:
        """Reads the new tokens from number `start` on. Raises TideError if logits are not finite."""
        ...

    def finish(self, state: Any, call: Call) -> None:
        """Keeps what the next generation may use."""
        ...


class PlainDecoding:
    """``mode="exit"`` and ``mode="full"``: a pass gives each row one token."""

    def __init__(self, model: Decoder, programs: Programs) -> None:
        self._model, self._programs, self._fixed = model, programs, Fixed(model)

    def whole(self, call: Call) -> GenerateOutput:
        arguments = (call.prompt, call.request, call.exits)
        out, seconds, compiled = self._programs.run(generate_tokens, self._fixed, arguments, capacity=call.capacity)
        out = fetch(out)
        rows, steps = call.count, int(out.steps)
        check_finite(out.finite[:rows], self._model.dtype)
        return make_output(
            call.rows.rows,
            out.tokens[:rows, :steps],
            out.exit_layers[:rows, :steps],
            num_layers=self._model.config.num_layers,
            layers_executed=int(np.sum(out.layers_executed)),
            steps=steps,
            wall_time=seconds,
            compile_time=compiled,
        )

    def begin(self, call: Call) -> GenerationState:
        arguments = (call.prompt, call.request, call.exits)
        return self._programs.run(begin, self._fixed, arguments, capacity=call.capacity)[0]

    def advance(self, state: GenerationState, call: Call) -> GenerationState:
        return self._programs.run(advance, self._fixed, (state, call.request, call.exits), donate=1)[0]

    def read(self, state: GenerationState, call: Call, start: int) -> Reading:
        step, done, finite, last, exit_layers, layers = fetch(
            (state.step, state.done, state.finite, state.last, state.exit_layers, state.layers_executed)
        )
        check_finite(finite[: call.count], self._model.dtype)
        done = done[: call.count] | (step >= call.request.max_new_tokens)
        new = slice(0, int(step) - start)
        return Reading(last[: call.count, None][:, new], exit_layers[: call.count, None][:, new], int(layers), done)

    def finish(self, state: GenerationState, call: Call) -> None:
        """Nothing is learned."""


def run_steps(decoding: Decoding, call: Call, programs: Programs) -> Iterator[StreamStep]:
    """Runs a call pass by pass, and yields a step once every running row has a token for it."""
    search = StopSearch(call.stops, call.count, int(call.request.pad))
    state, read, layers, ran = decoding.begin(call), 0, 0, True
    while True:
        reading = decoding.read(state, call, read)
        layers += reading.layers if ran else 0
        # Yield the new columns, each cut where stop strings ended rows.
        before = search.ended.copy()
        for tokens, exit_layers in zip(reading.tokens.T, reading.exit_layers.T, strict=True):
            if not search.ended.all():
                try:
                    yield search.cut(StreamStep(tokens, exit_layers, layers, reading.drafts))
                except GeneratorExit:  # nobody reads on
                    decoding.finish(state, call)
                    raise
                layers = 0
        read += reading.tokens.shape[1]
        # Rows that a stop string ended do not run any more. Read again: other rows may have waited for them.
        ran = bool((search.ended == before).all())
        if not ran:
            ended = pad_rows(search.ended, len(call.prompt.lengths), 0)
            state = state._replace(done=programs.run(jnp.logical_or, (), (state.done, ended), donate=0)[0])
        elif reading.done.all():
            decoding.finish(state, call)
            return
        else:
            state = decoding.advance(state, call)


def collect_steps(
    decoding: Decoding,
    call: Call,
    programs: Programs,
    num_layers: int,
    each: Callable[[np.ndarray], None] = lambda tokens: None,
) -> GenerateOutput:
    """Runs a call step by step and returns its result; `each` gets the tokens of every step."""
    # Time the loop; compilation that happens inside is subtracted below.
    compiled_before, start, steps = programs.compile_time, time.perf_counter(), []
    for step in run_steps(decoding, call, programs):
        each(step.tokens)
        steps.append(step)
    compiled, drafts = programs.compile_time - compiled_before, steps[-1].drafts
    return make_output(
        call.rows.rows,
        np.stack([s.tokens for s in steps], axis=1),
        np.stack([s.exit_layers for s in steps], axis=1),
        num_layers=num_layers,
        layers_executed=sum(s.layers_executed for s in steps),
        steps=len(steps) if drafts is None else drafts.passes,
        wall_time=time.perf_counter() - start - compiled,
        compile_time=compiled,
        drafts=drafts,
    )


def stream_to(streamer: Any, decoding: Decoding, call: Call, programs: Programs, num_layers: int) -> GenerateOutput:
    """Runs a call of one row step by step, and passes each token to the streamer.

    Raises:
      TideError: `streamer` is no streamer, or the call has several rows.
    """
    if not all(callable(getattr(streamer, name, None)) for name in ("put", "end")):
        raise TideError(f"streamer is {type(streamer).__name__}, expected an object with put(array) and end()")
    if call.count != 1:
        raise TideError(f"a streamer takes one prompt at a time, got {call.count}; use TIDE.stream for a batch")
    streamer.put(np.stack(call.rows.rows))
    out = collect_steps(decoding, call, programs, num_layers, streamer.put)
    streamer.end()
    return out


def make_output(
    prompts: Sequence[np.ndarray],
    tokens: np.ndarray,
    exit_layers: np.ndarray,
    *,
    drafts: DraftStats | None = None,
    **figures: Any,
) -> GenerateOutput:
    """Result of a generation with its statistics; `figures` are arguments of `ExitStats.from_exit_layers`."""
    stats = ExitStats.from_exit_layers(exit_layers, **figures)
    lengths = np.sum(exit_layers >= 0, axis=1).astype(np.int32)
    return GenerateOutput(tokens, lengths, exit_layers, dataclasses.replace(stats, drafts=drafts), tuple(prompts))
