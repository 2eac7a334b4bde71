"""Finds out how a decoder layer is built: its sublayers, norms and residual adds."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple, NoReturn, get_args

import numpy as np

from convert.probe.attention import AttentionPieces, FoundAttention, find_attention
from convert.probe.latent import FoundLatentAttention, find_latent
from convert.probe.mlp import FoundMLP, find_mlp
from convert.probe.moe import FoundMoE, find_moe
from convert.probe.trace import (
    MATCH,
    Linear,
    NormCall,
    Trace,
    distance,
    exactly_equal,
    find_bare_norm,
    fit_factor,
    nearly_equal,
    parameter_owner,
)
from tide_jax.errors import TideError
from tide_jax.model.architecture import NormPlacement


@dataclasses.dataclass(frozen=True)
class FoundLayer:
    """Result for one decoder layer.

    Attributes:
      attention, mlp: its sublayers.
      norms: the norms around them, by their names in a `DecoderLayer`.
      placement, parallel, shared, residual_scale: flags of the decoder.
    """

    attention: FoundAttention | FoundLatentAttention
    mlp: FoundMLP | FoundMoE
    norms: dict[str, NormCall]
    placement: NormPlacement
    parallel: bool
    shared: bool
    residual_scale: float


class DivergenceError(TideError):
    """No candidate matches what a layer computes."""


def find_layer(trace: Trace, index: int, hints: Sequence[FoundLayer]) -> FoundLayer:
    """Finds out what one layer computes.

    Args:
      hints: other layers of the model, tried first.

    Raises:
      Diverged: no candidate matches a part of it. The message names the part and the closest candidate's difference.
    """
    return _Layer(trace, index).find(hints)


def raise_divergence(where: str, what: str, error: float) -> NoReturn:
    """Raises `DivergenceError`; `error` is the closest candidate's."""
    by = f"the closest candidate differs by {error:.1e} of the range" if np.isfinite(error) else "no candidate fits"
    raise DivergenceError(f"{where} diverges first: {what}, {by}")


class _ResidualAdd(NamedTuple):
    """A residual add: ``start + scale * added`` should equal `total`."""

    start: np.ndarray
    added: np.ndarray
    total: np.ndarray


class _Layer:
    def __init__(self, trace: Trace, index: int) -> None:
        self.trace, self.index = trace, index
        name = trace.layers[index]
        call, parts = trace.find_call(name), trace.parts_inside(name)
        self.x, self.y = call.inputs, call.output
        self.call_order = [id(part) for part in parts].index
        self.linears = [part for part in parts if isinstance(part, Linear) and len(part.inputs) == len(self.x)]
        self.norms = [part for part in parts if isinstance(part, NormCall)]
        owners = {part.name for part in parts}
        self.vectors = tuple(
            parameter
            for parameter, weight in trace.weights.items()
            if parameter.startswith(f"{name}.") and weight.ndim == 1 and parameter_owner(parameter) not in owners
        )

    def find(self, hints: Sequence[FoundLayer]) -> FoundLayer:
        mlp = self.feed_forward(hints)
        attention = self.attention([x for x in self.linears if not mlp.owns(x)], hints)
        # Try every placement of norms and residual adds, and keep the closest.
        plans = [
            self.try_placement(attention, mlp, placement, parallel)
            for placement in get_args(NormPlacement)
            for parallel in ((False, True) if placement == "pre" else (False,))
        ]
        error, found = min(plans, key=lambda plan: plan[0])
        if found is None or error > MATCH:
            self.fail("no placement of norms and residual adds gives its output", error)
        return dataclasses.replace(found, residual_scale=self.trace.snap_to_known(found.residual_scale))

    def feed_forward(self, hints: Sequence[FoundLayer]) -> FoundMLP | FoundMoE:
        """Returns the mixture of experts if the layer has experts, else the dense feed-forward block."""
        hint = next((layer.mlp for layer in hints if isinstance(layer.mlp, FoundMoE)), None)
        mixture = find_moe(self.trace, self.trace.layers[self.index], [*self.linears, *self.norms], hint)
        if mixture is not None:
            if mixture[0] is None:
                self.fail("no mixture of experts gives the output of the experts' block", mixture[1])
            return mixture[0]
        found, error = find_mlp(self.trace, self.linears, self.norms, self.x.shape[1])
        if found is None:
            self.fail("no feed-forward block gives the input of its last linear map", error)
        return found

    def fail(self, what: str, error: float) -> NoReturn:
        raise_divergence(f"layer {self.index}", what, error)

    def attention(
        self, remaining: Sequence[Linear], hints: Sequence[FoundLayer]
    ) -> FoundAttention | FoundLatentAttention:
        """Finds attention among the linear maps that are not the feed-forward block's."""
        outs = [x for x in remaining if x.output.shape[1] == self.x.shape[1]]
        if len(remaining) < 2 or not outs:
            self.fail(
                f"{len(remaining)} linear maps are left for attention, expected projections and an output projection",
                np.inf,
            )
        out = outs[-1]
        projections = tuple(x for x in remaining if x is not out)
        low_rank = find_latent(self.trace, self.index, projections, self.norms, out)
        if low_rank is not None:
            if low_rank[0] is None:
                self.fail("no kind of latent attention gives the input of its output projection", low_rank[1])
            return low_rank[0]
        if others := [x.name for x in projections if not exactly_equal(x.inputs, projections[0].inputs)]:
            self.fail(f"{', '.join(others)} do not read the input of the other projections", np.inf)
        between = self.call_order(id(projections[0])), self.call_order(id(out))
        norms = tuple(norm for norm in self.norms if between[0] < self.call_order(id(norm)) < between[1])
        pieces = AttentionPieces(
            self.index, projections, out, norms, self.norm_with_output(out.inputs, ()), self.vectors
        )
        specs = dict.fromkeys(h.attention.spec for h in hints if isinstance(h.attention, FoundAttention))
        found, error = find_attention(self.trace, pieces, list(specs))
        if found is None:
            self.fail("no kind of attention gives the input of its output projection", error)
        return found

    def try_placement(
        self,
        attention: FoundAttention | FoundLatentAttention,
        mlp: FoundMLP | FoundMoE,
        placement: NormPlacement,
        parallel: bool,
    ) -> tuple[float, FoundLayer | None]:
        """Returns one placement of norms and adds with its error; the error is infinite if a norm is missing."""
        reads, gives = [attention.inputs, mlp.inputs], [attention.out.output, mlp.output]
        shared = parallel and exactly_equal(*reads)
        norms: dict[str, NormCall | None] = {}
        # Norms after a sublayer: the stream receives their outputs.
        if placement in ("post", "sandwich"):
            found = [self.norm_with_input(output) for output in gives]
            norms |= dict(zip(("post_attention_norm", "post_mlp_norm"), found, strict=True))
            gives = [output if norm is None else norm.output for norm, output in zip(found, gives, strict=True)]
        # Norms before a sublayer: the stream is their input.
        if placement in ("pre", "sandwich"):
            # The stream gains the sum of both outputs.
            sum_scale = np.float32(fit_factor(self.y - self.x, gives[0] + gives[1]))
            found = [self.norm_with_output(inputs, (self.x, self.x + sum_scale * gives[0])) for inputs in reads]
            norms |= dict(zip(("pre_attention_norm", "pre_mlp_norm"), found[: 1 if shared else 2], strict=False))
            reads = [inputs if norm is None else norm.inputs for norm, inputs in zip(found, reads, strict=True)]
        totals = [reads[1], self.y]
        # Norms after the add: they read the sum.
        if placement == "residual":
            sums = self.x + gives[0], reads[1] + gives[1]
            found = [self.norm_with_output(total, (added,)) for total, added in zip(totals, sums, strict=True)]
            norms |= dict(zip(("post_attention_norm", "post_mlp_norm"), found, strict=True))
            totals = [total if norm is None else norm.inputs for norm, total in zip(found, totals, strict=True)]
        present = {name: norm for name, norm in norms.items() if norm is not None}
        if len(present) < len(norms):
            return np.inf, None
        # Check the residual adds themselves, with one fitted scale.
        steps = [_ResidualAdd(self.x, gives[0], totals[0]), _ResidualAdd(reads[1], gives[1], totals[1])]
        if parallel:
            steps = [_ResidualAdd(self.x, gives[0] + gives[1], self.y)]
        scale = fit_factor(steps[-1].total - steps[-1].start, steps[-1].added)
        errors = [distance(step.start + np.float32(scale) * step.added, step.total) for step in steps]
        errors += [distance(stream, self.x) for stream in (reads if parallel else reads[:1])]
        return max(errors), FoundLayer(attention, mlp, present, placement, parallel, shared, scale)

    def norm_with_output(self, output: np.ndarray, streams: Sequence[np.ndarray]) -> NormCall | None:
        """Returns the norm with this output: a recorded one, else one that code without a module ran on a stream."""
        recorded = next((norm for norm in self.norms if exactly_equal(norm.output, output)), None)
        if recorded is not None or any(nearly_equal(stream, output) for stream in streams):
            return recorded
        bare = (find_bare_norm(self.trace, stream, output, self.vectors) for stream in streams)
        return next((norm for norm in bare if norm is not None), None)

    def norm_with_input(self, inputs: np.ndarray) -> NormCall | None:
        """Returns the norm with this input."""
        return next((norm for norm in self.norms if exactly_equal(norm.inputs, inputs)), None)
