"""``mode="lossless"`` for `tide_jax.generation.driver`; keeps measured costs and learned acceptance rates."""

from __future__ import annotations

import time

import numpy as np

from tide_jax.generation.driver import Call, Reading, make_output
from tide_jax.generation.finite import check_finite
from tide_jax.generation.outputs import GenerateOutput
from tide_jax.generation.programs import Programs
from tide_jax.generation.stats import DraftStats
from tide_jax.lossless.control import DraftControl, PassCosts
from tide_jax.lossless.costs import measure_pass_costs
from tide_jax.lossless.speculate import (
    DraftCounts,
    LosslessState,
    advance_lossless,
    begin_lossless,
    generate_lossless,
)
from tide_jax.model.decoder import Decoder
from tide_jax.model.sharding import fetch, from_first_process, mesh_context, mesh_of


class Learned:
    """What an engine knows about drafting at each batch size: costs of passes, measured once, and acceptance rates."""

    def __init__(self) -> None:
        self._costs: dict[int, PassCosts] = {}
        self._control: dict[int, DraftControl] = {}

    def costs(self, model: Decoder, batch: int) -> tuple[PassCosts, float]:
        """Costs of passes at a batch size, and the seconds spent measuring them in this call."""
        start = time.perf_counter()
        if batch not in self._costs:
            with mesh_context(mesh_of(model)):
                self._costs[batch] = from_first_process(measure_pass_costs(model, batch=batch))
        return self._costs[batch], time.perf_counter() - start

    def control(self, batch: int) -> DraftControl:
        """Acceptance rates learned at a batch size."""
        return self._control.get(batch) or DraftControl.start()

    def keep(self, batch: int, control: DraftControl) -> None:
        """Stores the acceptance rates after a generation."""
        self._control[batch] = control


class LosslessDecoding:
    """``mode="lossless"``: a pass gives each row one token and its accepted drafts; every token ran all layers."""

    def __init__(self, model: Decoder, programs: Programs, learned: Learned) -> None:
        self._model, self._programs, self._learned = model, programs, learned
        self._layers = model.config.num_layers

    def whole(self, call: Call) -> GenerateOutput:
        batch, rows = len(call.prompt.lengths), call.count
        costs, measuring = self._learned.costs(self._model, batch)
        arguments = (call.prompt, call.request, costs, self._learned.control(batch))
        out, seconds, compiled = self._programs.run(
            generate_lossless, (self._model,), arguments, capacity=call.capacity
        )
        # The acceptance rates stay on the device, for the next call; the rest is fetched, without the padding rows.
        control, out = out.control, fetch(out._replace(control=None))
        check_finite(out.finite[:rows], self._model.dtype)
        self._learned.keep(batch, control)
        longest = int(np.max(out.lengths[:rows]))
        return make_output(
            call.rows.rows,
            out.tokens[:rows, :longest],
            self._exit_layers(np.arange(longest)[None] < out.lengths[:rows, None]),
            num_layers=self._layers,
            layers_executed=int(out.counts.passes) * self._layers,
            steps=int(out.counts.passes),
            wall_time=seconds,
            compile_time=compiled + measuring,
            drafts=_draft_stats(out.counts),
        )

    def begin(self, call: Call) -> LosslessState:
        batch = len(call.prompt.lengths)
        _, measuring = self._learned.costs(self._model, batch)
        self._programs.compile_time += measuring  # count it as compiling, not as running
        arguments = (call.prompt, call.request, self._learned.control(batch))
        return self._programs.run(begin_lossless, (self._model,), arguments, capacity=call.capacity)[0]

    def advance(self, state: LosslessState, call: Call) -> LosslessState:
        costs, _ = self._learned.costs(self._model, len(call.prompt.lengths))
        return self._programs.run(advance_lossless, (self._model,), (state, call.request, costs), donate=1)[0]

    def read(self, state: LosslessState, call: Call, start: int) -> Reading:
        done, finite, ends, tokens, counts, width = fetch(
            (state.done, state.finite, state.ends - state.width, state.tokens, state.counts, state.width)
        )
        done, finite, ends, tokens = (array[: call.count] for array in (done, finite, ends, tokens))
        check_finite(finite, self._model.dtype)
        # A pass gives rows different numbers of tokens. A column is ready once every running row has a token for it.
        ready = int(ends.max() if done.all() else ends[~done].min())
        columns = np.arange(start, max(start, ready))
        made = columns[None] < ends[:, None]
        new = np.where(made, tokens[:, int(width) + columns], int(call.request.pad)).astype(np.int32)
        return Reading(new, self._exit_layers(made), self._layers, done, _draft_stats(counts))

    def finish(self, state: LosslessState, call: Call) -> None:
        self._learned.keep(len(call.prompt.lengths), state.control)

    def _exit_layers(self, made: np.ndarray) -> np.ndarray:
        """The last layer where there is a token, -1 elsewhere."""
        return np.where(made, self._layers - 1, -1).astype(np.int32)


def _draft_stats(counts: DraftCounts) -> DraftStats:
    return DraftStats(**{name: int(n) for name, n in counts._asdict().items()})
