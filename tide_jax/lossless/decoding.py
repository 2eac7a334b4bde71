"""``mode="lossless"`` for `tide_jax.generation.driver`; keeps drafters, measured costs and acceptance rates."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any, NamedTuple

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
_TWIN_PAYS_TO = 8
"""Rows up to which the twin is the default. Drafts of more rows compute more than they read."""


def check_draft(draft: Any, mode: Mode | None) -> None:
    """Raises TideError unless `draft` is None, or one of `DRAFTS` and the mode is "lossless"."""
    expected = " or ".join(map(repr, DRAFTS))
    if draft is not None and (not isinstance(draft, str) or draft not in DRAFTS):
        raise TideError(f"draft={shorten(repr(draft), 60)} is not known; choose {expected}, or leave it out")
    if draft is not None and mode != "lossless":
        raise TideError(f"draft={draft!r} is for mode='lossless', and this call has mode={mode!r}: change one of them")


def default_draft(model: Decoder) -> str:
    """The drafts of a model whose user names none: "int8" where the twin is measured to pay.

    That is on a CPU with the weight product's kernel, for float weights that exceed the caches, without a mesh.
    """
    weights = sum(parameter.value.nbytes for parameter in stored_parameters(model))
    x = jnp.ones((1, model.config.hidden_size), model.dtype)
    pays = model.weights == "float" and mesh_of(model) is None and weights >= _TWIN_PAYS_FROM
    return "int8" if pays and weight_product.pays(x, ((jnp.ones((1, x.shape[1]), x.dtype), None),)) else "text"


class Learned:
    """What an engine knows about drafting, by batch size and drafts: costs, measured once, and acceptance rates."""

    def __init__(self) -> None:
        self._drafters: dict[str, tuple[Drafter, ...]] = {}
        self._default: str | None = None
        self._costs: dict[tuple[int, str], PassCosts] = {}
        self._control: dict[tuple[int, str], DraftControl] = {}

    def default(self, model: Decoder, rows: int, new_tokens: int) -> str:
        """`default_draft`, but "text" for many rows, for one token, and where the memory doesn't suffice."""
        if rows > _TWIN_PAYS_TO or new_tokens <= 1:
            return "text"
        if self._default is None:
            self._default = default_draft(model)
            try:
                self.drafters(model, self._default)
            except TideError as error:
                logger.warning("drafting from the text alone: %s", error)
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
                raise TideError(
                    "too little memory for the 8-bit twin, a quarter of float32's: use draft='text'"
                ) from error
        return self._drafters[draft]

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
        self._model, self._programs, self._learned, self._asked = model, programs, learned, draft
        self._layers = model.config.num_layers

    def whole(self, call: Call) -> GenerateOutput:
        drafting, rows = self._prepare(call), call.count
        arguments = (call.prompt, call.request, drafting.costs, self._control(call))
        # The name of the drafts is part of the program's key; the drafters, like the model, are not.
        out, seconds, compiled = self._programs.run(
            _whole, (self._model, drafting.drafters), arguments, capacity=call.capacity, draft=drafting.name
        )
        # The acceptance rates stay on the device, for the next call; the rest is fetched, without the padding rows.
        control, out = out.control, fetch(out._replace(control=None))
        check_finite(out.finite[:rows], self._model.dtype)
        self._learned.keep(len(call.prompt.lengths), drafting.name, control)
        longest = int(np.max(out.lengths[:rows]))
        return make_output(
            call.rows.rows,
            out.tokens[:rows, :longest],
            self._exit_layers(np.arange(longest)[None] < out.lengths[:rows, None]),
            num_layers=self._layers,
            layers_executed=int(out.counts.passes) * self._layers,
            steps=int(out.counts.passes),
            wall_time=seconds,
            compile_time=compiled + drafting.seconds,
            drafts=drafting.stats(out.counts),
        )

    def begin(self, call: Call) -> LosslessState:
        drafting = self._prepare(call)
        self._programs.compile_time += drafting.seconds  # count it as compiling, not as running
        fixed, arguments = (self._model, drafting.drafters), (call.prompt, call.request, self._control(call))
        return self._programs.run(_begin, fixed, arguments, capacity=call.capacity, draft=drafting.name)[0]

    def advance(self, state: LosslessState, call: Call) -> LosslessState:
        drafting = self._prepare(call)
        fixed, arguments = (self._model, drafting.drafters), (state, call.request, drafting.costs)
        return self._programs.run(_advance, fixed, arguments, donate=2, draft=drafting.name)[0]

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

    def _prepare(self, call: Call) -> _Drafting:
        """Who drafts in this call, and what that costs; what is not known yet is made and measured."""
        start, batch = time.perf_counter(), len(call.prompt.lengths)
        name = self._asked
        if name is None:
            name = self._learned.default(self._model, batch, int(call.request.max_new_tokens))
        drafters = self._learned.drafters(self._model, name)
        costs = self._learned.costs(self._model, batch, name)
        return _Drafting(name, drafters, costs, time.perf_counter() - start)

    def _control(self, call: Call) -> DraftControl:
        return self._learned.control(self._model, len(call.prompt.lengths), self._prepare(call).name)

    def _exit_layers(self, made: np.ndarray) -> np.ndarray:
        """The last layer where there is a token, -1 elsewhere."""
        return np.where(made, self._layers - 1, -1).astype(np.int32)


class _Drafting(NamedTuple):
    """Drafters of a call.

    Attributes:
      name: one of `DRAFTS`.
      drafters, costs: who drafts, and what passes and drafts cost.
      seconds: what making and measuring them took just now.
    """

    name: str
    drafters: tuple[Drafter, ...]
    costs: PassCosts
    seconds: float

    def stats(self, counts: DraftCounts) -> DraftStats:
        """What was drafted, by whom, and why."""
        step, made = float(self.costs.passes[0]), zip(counts.chosen, counts.drafted, counts.accepted, strict=True)
        widths = verify_widths(MOST_SLOTS)
        return DraftStats(
            passes=int(counts.passes),
            by_drafter={d.name: DrafterStats(*map(int, n)) for d, n in zip(self.drafters, made, strict=True)},
            pass_steps={width: float(self.costs.passes[i]) / step for i, width in enumerate(widths)},
            draft_steps={d.name: float(self.costs.drafts[i]) / step for i, d in enumerate(self.drafters)},
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
