"""``mode="lossless"`` for `tide_jax.generation.driver`; keeps drafters, measured costs and acceptance rates."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from pallas_kernels import weight_product
from tide_jax.config import Mode
from tide_jax.errors import TideError, out_of_memory, shorten
from tide_jax.generation.driver import Call, Reading, make_output
from tide_jax.generation.finite import check_finite
from tide_jax.generation.generate import Prompt, Request
from tide_jax.generation.outputs import GenerateOutput
from tide_jax.generation.programs import Programs
from tide_jax.generation.stats import DrafterStats, DraftStats
from tide_jax.lossless.control import DraftControl, PassCosts, pass_widths
from tide_jax.lossless.costs import measure_pass_costs
from tide_jax.lossless.drafts import Drafter
from tide_jax.lossless.speculate import (
    MOST_SLOTS,
    TEXT_ONLY,
    DraftCounts,
    LosslessGenerated,
    LosslessState,
    advance_lossless,
    begin_lossless,
    generate_lossless,
)
from tide_jax.lossless.twin import TwinDrafter, make_twin
from tide_jax.model.decoder import Decoder, stored_parameters
from tide_jax.model.sharding import fetch, from_first_process, mesh_context, mesh_of

DRAFTS = ("text", "int8")
"""Who drafts: the row's own text; the model's 8-bit twin (`tide_jax.lossless.twin`) and the text."""
_TWIN_PAYS_FROM = 64 * 2**20
"""Bytes of weights from which the twin is the default. Smaller models are read from a CPU's caches."""


def check_draft(draft: Any, mode: Mode | None) -> None:
    """Raises TideError unless `draft` is None, or one of `DRAFTS` and the mode is "lossless"."""
    if draft is not None and (not isinstance(draft, str) or draft not in DRAFTS):
        raise TideError(f"draft={shorten(repr(draft), 60)} is not known; choose 'text' or 'int8', or leave it out")
    if draft is not None and mode != "lossless":
        raise TideError(f"draft={draft!r} is for mode='lossless', and this call has mode={mode!r}: change one of them")


def default_draft(model: Decoder) -> str:
    """The drafts of a model whose user names none: "int8" where the twin is measured to pay.

    That is on a CPU with the weight product's kernel, for float weights that exceed the caches.
    """
    weights = sum(parameter.value.nbytes for parameter in stored_parameters(model))
    x = jnp.ones((1, model.config.hidden_size), model.dtype)
    pays = model.weights == "float" and mesh_of(model) is None and weights >= _TWIN_PAYS_FROM
    return "int8" if pays and weight_product.pays(x, ((jnp.ones((1, x.shape[1]), x.dtype), None),)) else "text"


class Learned:
    """What an engine knows about drafting, by batch size and drafts: costs, measured once, and acceptance rates."""

    def __init__(self) -> None:
        self._costs: dict[tuple[int, str], PassCosts] = {}
        self._control: dict[tuple[int, str], DraftControl] = {}
        self._twin: TwinDrafter | None = None
        self._default: str | None = None

    def default(self, model: Decoder) -> str:
        """`default_draft`, found out once."""
        if self._default is None:
            self._default = default_draft(model)
        return self._default

    def drafters(self, model: Decoder, draft: str) -> tuple[Drafter, ...]:
        """The drafters of one of `DRAFTS`; the first call for "int8" makes the twin."""
        if draft == "text":
            return TEXT_ONLY
        if self._twin is None:
            try:
                self._twin = TwinDrafter(make_twin(model))
            except Exception as error:
                if out_of_memory(error) is None:
                    raise
                raise TideError(
                    "too little memory for the 8-bit twin, a quarter of float32's: use draft='text'"
                ) from error
        return (*TEXT_ONLY, self._twin)

    def costs(self, model: Decoder, batch: int, draft: str) -> PassCosts:
        """Costs of passes and drafts at a batch size."""
        if (batch, draft) not in self._costs:
            with mesh_context(mesh_of(model)):
                found = measure_pass_costs(model, self.drafters(model, draft), batch=batch)
            self._costs[batch, draft] = from_first_process(found)
        return self._costs[batch, draft]

    def control(self, model: Decoder, batch: int, draft: str) -> DraftControl:
        """Acceptance rates learned at a batch size."""
        return self._control.get((batch, draft)) or DraftControl.start(self.drafters(model, draft))

    def keep(self, batch: int, draft: str, control: DraftControl) -> None:
        """Stores the acceptance rates after a generation."""
        self._control[batch, draft] = control


class LosslessDecoding:
    """``mode="lossless"``: a pass gives each row one token and its accepted drafts; every token ran all layers."""

    def __init__(self, model: Decoder, programs: Programs, learned: Learned, draft: str | None) -> None:
        self._model, self._programs, self._learned = model, programs, learned
        self._draft = learned.default(model) if draft is None else draft
        self._layers = model.config.num_layers

    def whole(self, call: Call) -> GenerateOutput:
        batch, rows = len(call.prompt.lengths), call.count
        drafters, costs, measuring = self._prepare(batch)
        control = self._learned.control(self._model, batch, self._draft)
        # Other drafters have other numbers of costs and rates, so that their programs are other ones, too.
        out, seconds, compiled = self._programs.run(
            _whole, (self._model, drafters), (call.prompt, call.request, costs, control), capacity=call.capacity
        )
        # The acceptance rates stay on the device, for the next call; the rest is fetched, without the padding rows.
        control, out = out.control, fetch(out._replace(control=None))
        check_finite(out.finite[:rows], self._model.dtype)
        self._learned.keep(batch, self._draft, control)
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
            drafts=_draft_stats(out.counts, drafters, costs),
        )

    def begin(self, call: Call) -> LosslessState:
        batch = len(call.prompt.lengths)
        drafters, _, measuring = self._prepare(batch)
        self._programs.compile_time += measuring  # count it as compiling, not as running
        arguments = (call.prompt, call.request, self._learned.control(self._model, batch, self._draft))
        sizes = {"capacity": call.capacity, "num_drafters": len(drafters)}
        return self._programs.run(begin_lossless, (self._model,), arguments, **sizes)[0]

    def advance(self, state: LosslessState, call: Call) -> LosslessState:
        drafters, costs, _ = self._prepare(len(call.prompt.lengths))
        fixed, arguments = (self._model, drafters), (state, call.request, costs)
        return self._programs.run(advance_lossless, fixed, arguments, donate=2)[0]

    def read(self, state: LosslessState, call: Call, start: int) -> Reading:
        drafters, costs, _ = self._prepare(len(call.prompt.lengths))
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
        return Reading(
            new,
            self._exit_layers(made),
            self._layers,
            done,
            _draft_stats(counts, drafters, costs),
        )

    def finish(self, state: LosslessState, call: Call) -> None:
        self._learned.keep(len(call.prompt.lengths), self._draft, state.control)

    def _prepare(self, batch: int) -> tuple[tuple[Drafter, ...], PassCosts, float]:
        """The drafters, the costs at a batch size, and the seconds that making and measuring them took in this call."""
        start = time.perf_counter()
        drafters = self._learned.drafters(self._model, self._draft)
        costs = self._learned.costs(self._model, batch, self._draft)
        return drafters, costs, time.perf_counter() - start

    def _exit_layers(self, made: np.ndarray) -> np.ndarray:
        """The last layer where there is a token, -1 elsewhere."""
        return np.where(made, self._layers - 1, -1).astype(np.int32)


def _whole(
    model: Decoder,
    drafters: tuple[Drafter, ...],
    prompt: Prompt,
    request: Request,
    costs: PassCosts,
    control: DraftControl,
    *,
    capacity: int,
) -> LosslessGenerated:
    """`generate_lossless` with the drafters in front: they are not part of a program's key."""
    return generate_lossless(model, prompt, request, costs, control, drafters, capacity=capacity)


def _draft_stats(counts: DraftCounts, drafters: Sequence[Drafter], costs: PassCosts) -> DraftStats:
    step, widths = float(costs.passes[0]), pass_widths(MOST_SLOTS)
    in_steps = {f"a pass over {width} tokens": float(costs.passes[i]) / step for i, width in enumerate(widths) if i}
    in_steps |= {
        f"a draft of the {d.name}": float(costs.drafts[i]) / step for i, d in enumerate(drafters) if d.model is not None
    }
    by_drafter = {
        drafter.name: DrafterStats(*(int(n[number]) for n in (counts.chosen, counts.drafted, counts.accepted)))
        for number, drafter in enumerate(drafters)
    }
    passes, drafted, accepted = (int(n) for n in (counts.passes, counts.drafted.sum(), counts.accepted.sum()))
    return DraftStats(passes, drafted, accepted, by_drafter=by_drafter, costs=in_steps)
