"""``mode="lossless"`` for `tide_jax.generation.driver`; keeps drafters, measured costs and acceptance rates."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from pallas_kernels import weight_product
from tide_jax.errors import TideError, available_memory, out_of_memory, reports_out_of_memory, shorten
from tide_jax.generation.driver import Call, Reading, make_output
from tide_jax.generation.finite import check_finite
from tide_jax.generation.generate import Prompt, Request
from tide_jax.generation.outputs import GenerateOutput
from tide_jax.generation.programs import Fixed, Programs
from tide_jax.generation.stats import DrafterStats, DraftStats, DraftSteps
from tide_jax.lossless.control import DraftControl, PassCosts, verify_widths
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

logger = logging.getLogger(__name__)

DRAFTS: dict[str, Callable[[Decoder], tuple[Drafter, ...]]] = {
    "text": lambda model: TEXT_ONLY,
    "int8": lambda model: (*TEXT_ONLY, TwinDrafter(make_twin(model))),
}
"""Who drafts, by the name that users say: the row's own text; or the text and the model's 8-bit twin."""
_TWIN_PAYS_FROM = 64 * 2**20
"""Bytes of weights from which the twin is the default. Smaller models are read from a CPU's caches."""
_NO_ROOM = "the memory does not suffice for the 8-bit twin, which takes one byte a weight: use draft='text'"
_TWIN_PAYS_TO = 8
"""Rows up to which the twin is the default. Drafts of more rows compute more than they read."""


def check_draft(draft: Any, mode: Any) -> None:
    """Raises TideError unless `draft` is None, or one of `DRAFTS` and the mode is "lossless"."""
    expected = " or ".join(map(repr, DRAFTS))
    if draft is not None and (not isinstance(draft, str) or draft not in DRAFTS):
        raise TideError(f"draft={shorten(repr(draft), 60)} is not known; choose {expected}, or leave it out")
    if draft is not None and mode != "lossless":
        raise TideError(f"draft={draft!r} is for mode='lossless', and this call has mode={mode!r}: change one of them")


def default_draft(model: Decoder) -> str:
    """The drafts of a model whose user names none: "int8" where the twin was found to pay, on other models.

    That is on a CPU with the weight product's kernel, for float weights that exceed the caches, without a mesh.
    """
    weights = sum(parameter.value.nbytes for parameter in stored_parameters(model))
    x = jnp.ones((1, model.config.hidden_size), model.dtype)
    pays = model.weights == "float" and mesh_of(model) is None and weights >= _TWIN_PAYS_FROM
    return "int8" if pays and weight_product.pays(x, ((jnp.ones((1, x.shape[1]), x.dtype), None),)) else "text"


def check_memory(model: Decoder) -> None:
    """Raises TideError if this machine says that the twin does not fit.

    Linux promises memory that it does not have, and ends the process that uses it.
    """
    needed = sum(parameter.value.size for parameter in stored_parameters(model))
    if (available := available_memory()) is not None and available < 2 * needed:  # the caches and programs come, too
        raise TideError(_NO_ROOM)


class Learned:
    """What an engine knows about drafting, by batch size and drafts: costs, measured once, and acceptance rates."""

    def __init__(self) -> None:
        self._drafters: dict[str, tuple[Drafter, ...]] = {}
        self._default: str | None = None
        self._costs: dict[tuple[int, str], PassCosts] = {}
        self._control: dict[tuple[int, str], DraftControl] = {}

    def default(self, model: Decoder, rows: int) -> str:
        """`default_draft`, but "text" for many rows, and where the memory doesn't suffice."""
        if rows > _TWIN_PAYS_TO:
            return "text"
        if self._default is None:
            self._default = default_draft(model)
            try:
                if self._default == "int8":
                    check_memory(model)
                self.drafters(model, self._default)
            except TideError as error:
                logger.warning("the text drafts alone: %s", error)
                self._default = "text"
        return self._default

    def drafters(self, model: Decoder, draft: str) -> tuple[Drafter, ...]:
        """The drafters of one of `DRAFTS`, made at the first call. Raises TideError if memory runs out."""
        if draft not in self._drafters:
            try:
                self._drafters[draft] = DRAFTS[draft](model)
            except Exception as error:
                if out_of_memory(error) is None:
                    raise
                raise TideError(_NO_ROOM) from error
        return self._drafters[draft]

    def known(self, batch: int, draft: str) -> bool:
        """Whether costs at a batch size were measured."""
        return (batch, draft) in self._costs

    def costs(self, model: Decoder, batch: int, draft: str) -> PassCosts:
        """Costs of passes and drafts at a batch size. Raises TideError if memory runs out."""
        if not self.known(batch, draft):
            with reports_out_of_memory(), mesh_context(mesh_of(model)):
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
        self._model, self._programs, self._learned, self._asked = model, programs, learned, draft
        self._layers = model.config.num_layers
        self._setup: _Setup | None = None  # that of the call

    def whole(self, call: Call) -> GenerateOutput:
        setup, rows = self._prepare(call), call.count
        arguments = (call.prompt, call.request, setup.costs, self._control(call))
        # The name of the drafts is part of the program's key; the drafters, like the model, are not.
        out, seconds, compiled = self._programs.run(
            _whole, setup.fixed, arguments, capacity=call.capacity, draft=setup.name
        )
        # The acceptance rates stay on the device, for the next call; the rest is fetched, without the padding rows.
        control, out = out.control, fetch(out._replace(control=None))
        check_finite(out.finite[:rows], self._model.dtype)
        self._learned.keep(len(call.prompt.lengths), setup.name, control)
        longest = int(np.max(out.lengths[:rows]))
        return make_output(
            call.rows.rows,
            out.tokens[:rows, :longest],
            self._exit_layers(np.arange(longest)[None] < out.lengths[:rows, None]),
            num_layers=self._layers,
            layers_executed=int(out.counts.passes) * self._layers,
            steps=int(out.counts.passes),
            wall_time=seconds,
            compile_time=compiled + setup.seconds,
            drafts=setup.stats(out.counts),
        )

    def begin(self, call: Call) -> LosslessState:
        setup = self._prepare(call)
        self._programs.compile_time += setup.seconds  # count it as compiling, not as running
        arguments = (call.prompt, call.request, self._control(call))
        return self._programs.run(_begin, setup.fixed, arguments, capacity=call.capacity, draft=setup.name)[0]

    def advance(self, state: LosslessState, call: Call) -> LosslessState:
        setup = self._prepare(call)
        arguments = (state, call.request, setup.costs)
        return self._programs.run(_advance, setup.fixed, arguments, donate=2, draft=setup.name)[0]

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
        return Reading(new, self._exit_layers(made), self._layers, done, self._prepare(call).stats(counts))

    def finish(self, state: LosslessState, call: Call) -> None:
        self._learned.keep(len(call.prompt.lengths), self._prepare(call).name, state.control)

    def _prepare(self, call: Call) -> _Setup:
        """Who drafts in this call, and what that costs; what is not known yet is made and measured."""
        if self._setup is not None:
            return self._setup
        start, batch, seconds = time.perf_counter(), len(call.prompt.lengths), 0.0
        if int(call.request.max_new_tokens) <= 1:  # nothing to draft
            name, drafters, costs = "text", TEXT_ONLY, _UNKNOWN
        else:
            name = self._learned.default(self._model, batch) if self._asked is None else self._asked
            known = self._learned.known(batch, name)
            drafters = self._learned.drafters(self._model, name)
            costs = self._learned.costs(self._model, batch, name)
            seconds = 0.0 if known else time.perf_counter() - start
        self._setup = _Setup(name, drafters, Fixed(self._model, drafters), costs, _steps(drafters, costs), seconds)
        return self._setup

    def _control(self, call: Call) -> DraftControl:
        return self._learned.control(self._model, len(call.prompt.lengths), self._prepare(call).name)

    def _exit_layers(self, made: np.ndarray) -> np.ndarray:
        """The last layer where there is a token, -1 elsewhere."""
        return np.where(made, self._layers - 1, -1).astype(np.int32)


class _Setup(NamedTuple):
    """Drafters of a call.

    Attributes:
      name: one of `DRAFTS`.
      drafters, costs: who drafts, and what passes and drafts cost.
      fixed: model and drafters, for programs.
      steps: the same costs, for reports.
      seconds: what making and measuring them took just now.
    """

    name: str
    drafters: tuple[Drafter, ...]
    fixed: Fixed
    costs: PassCosts
    steps: DraftSteps
    seconds: float

    def stats(self, counts: DraftCounts) -> DraftStats:
        """What was drafted, by whom, and why."""
        made = zip(counts.chosen, counts.drafted, counts.accepted, strict=True)
        by_drafter = {d.name: DrafterStats(*map(int, n)) for d, n in zip(self.drafters, made, strict=True)}
        return DraftStats(int(counts.passes), by_drafter, self.steps)


_UNKNOWN = PassCosts(np.ones(len(verify_widths(MOST_SLOTS)), np.float32), np.zeros(1, np.float32), np.float32(0))
"""Costs of a call that drafts nothing."""


def _steps(drafters: tuple[Drafter, ...], costs: PassCosts) -> DraftSteps:
    """The costs in steps at full depth."""
    passes, drafts, attention = (np.asarray(a, np.float64) / float(costs.passes[0]) for a in costs)
    return DraftSteps(
        passes=dict(zip(verify_widths(MOST_SLOTS), passes.tolist(), strict=True)),
        drafts={drafter.name: steps for drafter, steps in zip(drafters, drafts.tolist(), strict=True)},
        attention=1000 * float(attention),
    )


# Programs of these functions take the drafters behind the model. `draft` is their name: part of the program's key.


def _whole(
    model: Decoder,
    drafters: tuple[Drafter, ...],
    prompt: Prompt,
    request: Request,
    costs: PassCosts,
    control: DraftControl,
    *,
    capacity: int,
    draft: str,
) -> LosslessGenerated:
    return generate_lossless(model, prompt, request, costs, control, drafters, capacity=capacity)


def _begin(
    model: Decoder,
    drafters: tuple[Drafter, ...],
    prompt: Prompt,
    request: Request,
    control: DraftControl,
    *,
    capacity: int,
    draft: str,
) -> LosslessState:
    return begin_lossless(model, prompt, request, control, drafters, capacity=capacity)


def _advance(
    model: Decoder,
    drafters: tuple[Drafter, ...],
    state: LosslessState,
    request: Request,
    costs: PassCosts,
    *,
    draft: str,
) -> LosslessState:
    return advance_lossless(model, drafters, state, request, costs)
