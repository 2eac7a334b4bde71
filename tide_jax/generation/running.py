"""Runs checked requests in compiled programs, whole or step by step, and builds their results."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import numpy as np

from tide_jax.errors import TideError
from tide_jax.exits.exits import Exits
from tide_jax.generation.batch import Rows
from tide_jax.generation.finite import check_finite
from tide_jax.generation.generate import Prompt, Request, advance, begin, generate_tokens
from tide_jax.generation.outputs import GenerateOutput, StreamStep
from tide_jax.generation.programs import Programs
from tide_jax.generation.stats import DraftStats, ExitStats
from tide_jax.model.decoder import Decoder
from tide_jax.model.sharding import fetch


class Call(NamedTuple):
    """A checked request, ready for the pure functions.

    `prompt` may have more rows than `rows`: empty rows that pad the batch and do not appear in the result.
    """

    rows: Rows
    prompt: Prompt
    request: Request
    exits: Exits | None
    capacity: int

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


class Runner(Protocol):
    """One way to run a call."""

    def whole(self, call: Call) -> GenerateOutput:
        """Runs the whole generation in one compiled program."""
        ...

    def steps(self, call: Call) -> Iterator[StreamStep]:
        """Runs the generation step by step."""
        ...


class PlainRunner:
    """Runner for ``mode="exit"`` and ``mode="full"``: one token of each row in each step."""

    def __init__(self, model: Decoder, programs: Programs) -> None:
        self._model, self._programs = model, programs

    def whole(self, call: Call) -> GenerateOutput:
        arguments = (call.prompt, call.request, call.exits)
        out, seconds, compiled = self._programs.run(generate_tokens, (self._model,), arguments, capacity=call.capacity)
        out = fetch(out)
        rows, steps = call.count, int(out.steps)
        check_finite(out.finite[:rows], self._model.dtype)
        return output(
            out.tokens[:rows, :steps],
            out.exit_layers[:rows, :steps],
            num_layers=self._model.config.num_layers,
            layers_executed=int(np.sum(out.layers_executed)),
            steps=steps,
            wall_time=seconds,
            compile_time=compiled,
        )

    def steps(self, call: Call) -> Iterator[StreamStep]:
        arguments = (call.prompt, call.request, call.exits)
        state, _, _ = self._programs.run(begin, (self._model,), arguments, capacity=call.capacity)
        while True:
            step, done, finite, *arrays = fetch(
                (state.step, state.done, state.finite, state.last, state.exit_layers, state.layers_executed)
            )
            check_finite(finite[: call.count], self._model.dtype)
            yield StreamStep(arrays[0][: call.count], arrays[1][: call.count], int(arrays[2]))
            if step >= call.request.max_new_tokens or done.all():
                return
            arguments = (state, call.request, call.exits)
            state, _, _ = self._programs.run(advance, (self._model,), arguments, donate=1)


def stream_to(streamer: Any, runner: Runner, call: Call, programs: Programs, num_layers: int) -> GenerateOutput:
    """Runs a call of one row step by step, and passes each token to the streamer."""
    if call.count != 1:
        raise TideError(f"a streamer takes one prompt at a time, got {call.count}; use TIDE.stream for a batch")
    streamer.put(np.stack(call.rows.rows))
    # Time the loop; compilation that happens inside is subtracted below.
    compiled_before, start, steps = programs.compile_time, time.perf_counter(), []
    for step in runner.steps(call):
        streamer.put(step.tokens)
        steps.append(step)
    streamer.end()
    compiled, drafts = programs.compile_time - compiled_before, steps[-1].drafts
    return output(
        np.stack([s.tokens for s in steps], axis=1),
        np.stack([s.exit_layers for s in steps], axis=1),
        num_layers=num_layers,
        layers_executed=sum(s.layers_executed for s in steps),
        steps=len(steps) if drafts is None else drafts.passes,
        wall_time=time.perf_counter() - start - compiled,
        compile_time=compiled,
        drafts=drafts,
    )


def output(
    tokens: np.ndarray, exit_layers: np.ndarray, *, drafts: DraftStats | None = None, **figures: Any
) -> GenerateOutput:
    """Result of a generation with its statistics; `figures` are arguments of `ExitStats.from_exit_layers`."""
    stats = ExitStats.from_exit_layers(exit_layers, **figures)
    lengths = np.sum(exit_layers >= 0, axis=1).astype(np.int32)
    return GenerateOutput(tokens, lengths, exit_layers, dataclasses.replace(stats, drafts=drafts))
