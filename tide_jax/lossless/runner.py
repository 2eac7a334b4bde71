"""Runs checked requests with drafts and their verification, and keeps what it has measured and learned."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from tide_jax.generation.finite import check_finite
from tide_jax.generation.generate import Exits
from tide_jax.generation.outputs import GenerateOutput, StreamStep
from tide_jax.generation.programs import Programs
from tide_jax.generation.running import Call, output
from tide_jax.generation.stats import DraftStats
from tide_jax.lossless.draft_control import DraftControl, PassCosts
from tide_jax.lossless.pass_costs import measure_pass_costs
from tide_jax.lossless.speculate import DraftCounts, advance_lossless, begin_lossless, generate_lossless
from tide_jax.model.decoder import Decoder
from tide_jax.model.sharding import agreed, fetch, mesh_context, mesh_of


class LosslessRunner:
    """Drafts and verification: ``mode="lossless"``. Keeps what it has measured and learned, by batch size."""

    def __init__(self, model: Decoder, programs: Programs, implementation: str | None, known: Drafting) -> None:
        self._model, self._programs, self._known = model, programs, known
        self._options: dict[str, Any] = {"implementation": implementation}

    def whole(self, call: Call) -> GenerateOutput:
        batch, rows = len(call.prompt.lengths), call.count
        costs, measuring = self._known.costs(self._model, call.exits, batch)
        arguments = (call.prompt, call.request, call.exits, costs, self._known.control(batch))
        out, seconds, compiled = self._programs.run(
            generate_lossless, (self._model,), arguments, capacity=call.capacity, **self._options
        )
        control, out = out.control, fetch(out._replace(control=None))
        check_finite(out.finite[:rows], self._model.dtype)
        self._known.learn(batch, control)
        longest, last = int(np.max(out.lengths[:rows])), self._model.config.num_layers - 1
        made = np.arange(longest)[None] < out.lengths[:rows, None]
        return output(
            out.tokens[:rows, :longest],
            np.where(made, last, -1).astype(np.int32),
            num_layers=last + 1,
            layers_executed=int(out.counts.layers_executed),
            steps=int(out.counts.passes),
            wall_time=seconds,
            compile_time=compiled + measuring,
            drafts=_draft_stats(out.counts),
        )

    def steps(self, call: Call) -> Iterator[StreamStep]:
        batch, width = call.prompt.tokens.shape
        costs, measuring = self._known.costs(self._model, call.exits, batch)
        self._programs.compile_time += measuring  # not running, either
        arguments = (call.prompt, call.request, call.exits, self._known.control(batch))
        state, _, _ = self._programs.run(
            begin_lossless, (self._model,), arguments, capacity=call.capacity, **self._options
        )
        sent, last, executed = 0, self._model.config.num_layers - 1, 0
        while True:
            done, finite, verified, tokens, counts = fetch(
                (state.done, state.finite, state.verified - state.width, state.tokens, state.counts)
            )
            done, finite, verified, tokens = (array[: call.count] for array in (done, finite, verified, tokens))
            check_finite(finite, self._model.dtype)
            # A step has a token of every row that goes on so far, so rows wait for the slowest of them.
            ready = int(verified.max() if done.all() else verified[~done].min())
            for n in range(sent, ready):
                there = n < verified
                column = np.where(there, tokens[:, width + n], int(call.request.pad)).astype(np.int32)
                layers = int(counts.layers_executed) - executed
                executed += layers
                yield StreamStep(column, np.where(there, last, -1).astype(np.int32), layers, _draft_stats(counts))
            sent = max(sent, ready)
            if done.all():
                self._known.learn(batch, state.control)
                return
            arguments = (state, call.request, call.exits, costs)
            state, _, _ = self._programs.run(advance_lossless, (self._model,), arguments, donate=1, **self._options)


class Drafting:
    """What an engine knows of drafts: costs of passes, measured once, and what generations have learned."""

    def __init__(self) -> None:
        self._costs: dict[int, PassCosts] = {}
        self._control: dict[int, DraftControl] = {}

    def costs(self, model: Decoder, exits: Exits | None, batch: int) -> tuple[PassCosts, float]:
        """The costs at a batch size, and the seconds that it took to measure them now."""
        start = time.perf_counter()
        if batch not in self._costs:
            routers = None if exits is None else exits.routers
            with mesh_context(mesh_of(model)):
                self._costs[batch] = agreed(measure_pass_costs(model, routers, batch=batch))
        return self._costs[batch], time.perf_counter() - start

    def control(self, batch: int) -> DraftControl:
        """What has been learned at a batch size."""
        return self._control.get(batch) or DraftControl.start()

    def learn(self, batch: int, control: DraftControl) -> None:
        """Keeps what a generation has learned."""
        self._control[batch] = control


def _draft_stats(counts: DraftCounts) -> DraftStats:
    return DraftStats(**{name: int(n) for name, n in counts._asdict().items() if name != "layers_executed"})
