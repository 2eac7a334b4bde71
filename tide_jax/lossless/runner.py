"""Runs checked requests with ``mode="lossless"``, and keeps measured costs and learned acceptance rates."""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np

from tide_jax.generation.finite import check_finite
from tide_jax.generation.outputs import GenerateOutput, StreamStep
from tide_jax.generation.programs import Programs
from tide_jax.generation.running import Call, output
from tide_jax.generation.stats import DraftStats
from tide_jax.lossless.control import DraftControl, PassCosts
from tide_jax.lossless.costs import measure_pass_costs
from tide_jax.lossless.speculate import DraftCounts, advance_lossless, begin_lossless, generate_lossless
from tide_jax.model.decoder import Decoder
from tide_jax.model.sharding import agreed, fetch, mesh_context, mesh_of


class LosslessRunner:
    """Runner for ``mode="lossless"``; costs and acceptance rates are shared between calls of one batch size."""

    def __init__(self, model: Decoder, programs: Programs, known: Drafting) -> None:
        self._model, self._programs, self._known = model, programs, known

    def whole(self, call: Call) -> GenerateOutput:
        batch, rows = len(call.prompt.lengths), call.count
        costs, measuring = self._known.costs(self._model, batch)
        arguments = (call.prompt, call.request, costs, self._known.control(batch))
        out, seconds, compiled = self._programs.run(
            generate_lossless, (self._model,), arguments, capacity=call.capacity
        )
        # The acceptance rates stay on the device, for the next call; the rest is fetched, without the padding rows.
        control, out = out.control, fetch(out._replace(control=None))
        check_finite(out.finite[:rows], self._model.dtype)
        self._known.learn(batch, control)
        # Every token ran all layers.
        longest, last = int(np.max(out.lengths[:rows])), self._model.config.num_layers - 1
        made = np.arange(longest)[None] < out.lengths[:rows, None]
        return output(
            out.tokens[:rows, :longest],
            np.where(made, last, -1).astype(np.int32),
            num_layers=last + 1,
            layers_executed=int(out.counts.passes) * (last + 1),
            steps=int(out.counts.passes),
            wall_time=seconds,
            compile_time=compiled + measuring,
            drafts=_draft_stats(out.counts),
        )

    def steps(self, call: Call) -> Iterator[StreamStep]:
        batch, width = call.prompt.tokens.shape
        costs, measuring = self._known.costs(self._model, batch)
        self._programs.compile_time += measuring  # count it as compiling, not as running
        arguments = (call.prompt, call.request, self._known.control(batch))
        state, _, _ = self._programs.run(begin_lossless, (self._model,), arguments, capacity=call.capacity)
        sent, last, executed = 0, self._model.config.num_layers - 1, 0
        while True:
            done, finite, ends, tokens, counts = fetch(
                (state.done, state.finite, state.ends - state.width, state.tokens, state.counts)
            )
            done, finite, ends, tokens = (array[: call.count] for array in (done, finite, ends, tokens))
            check_finite(finite, self._model.dtype)
            # A pass gives rows different numbers of tokens. Yield a column once every running row has a token for it.
            ready = int(ends.max() if done.all() else ends[~done].min())
            for n in range(sent, ready):
                there = n < ends
                column = np.where(there, tokens[:, width + n], int(call.request.pad)).astype(np.int32)
                layers = int(counts.passes) * (last + 1) - executed
                executed += layers
                yield StreamStep(column, np.where(there, last, -1).astype(np.int32), layers, _draft_stats(counts))
            sent = max(sent, ready)
            if done.all():
                self._known.learn(batch, state.control)
                return
            arguments = (state, call.request, costs)
            state, _, _ = self._programs.run(advance_lossless, (self._model,), arguments, donate=1)


class Drafting:
    """Drafting knowledge of an engine by batch size: costs of passes, measured once, and learned acceptance rates."""

    def __init__(self) -> None:
        self._costs: dict[int, PassCosts] = {}
        self._control: dict[int, DraftControl] = {}

    def costs(self, model: Decoder, batch: int) -> tuple[PassCosts, float]:
        """Costs of passes at a batch size, and the seconds spent measuring them in this call."""
        start = time.perf_counter()
        if batch not in self._costs:
            with mesh_context(mesh_of(model)):
                self._costs[batch] = agreed(measure_pass_costs(model, batch=batch))
        return self._costs[batch], time.perf_counter() - start

    def control(self, batch: int) -> DraftControl:
        """Acceptance rates learned at a batch size."""
        return self._control.get(batch) or DraftControl.start()

    def learn(self, batch: int, control: DraftControl) -> None:
        """Stores the acceptance rates after a generation."""
        self._control[batch] = control


def _draft_stats(counts: DraftCounts) -> DraftStats:
    return DraftStats(**{name: int(n) for name, n in counts._asdict().items()})
