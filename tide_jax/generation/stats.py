"""Statistics of a run: layers run, exits by layer, wall clock, accepted drafts, and drift from the full model."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import numpy as np
from jaxtyping import Int

Status = Literal["ok", "unknown", "exceeded"]


@dataclasses.dataclass(frozen=True)
class DriftReport:
    """Agreement of exits with the full model so far, over audited sequences.

    Attributes:
      sequences: finished sequences in which a token could exit early.
      audited: sequences run again at full depth.
      tokens: tokens compared.
      agreement: share of a sequence's tokens with the full model's argmax, mean over sequences; None before the first.
      lower, upper: confidence interval of the expected agreement, for sequences of one kind. It is valid at any time,
        however often it is read.
      confidence: confidence level of the interval. One minus it bounds the probability that `status` becomes "exceeded"
        for a promise that holds.
      risk: promised expected share of tokens that differ; None without a promise.
      status: "ok" if the whole interval satisfies the promise. "exceeded", permanently, once the whole interval or a
        run of sequences violates it. "unknown" otherwise.
      wall_time: seconds spent on audits, without compilation; not part of `ExitStats.wall_time`.
    """

    sequences: int
    audited: int
    tokens: int
    agreement: float | None
    lower: float
    upper: float
    confidence: float
    risk: float | None
    status: Status
    wall_time: float

    def summary(self) -> str:
        """One line to print."""
        counted = f"{self.audited} of {self.sequences} sequences audited"
        if self.agreement is None:
            return f"agreement with the full model: not known yet, {counted}"
        promise = "nothing promised" if self.risk is None else f"promised {1 - self.risk:.2%}: {self.status}"
        return (
            f"agreement with the full model: {self.agreement:.2%} ({100 * self.confidence:.4g} % interval "
            f"{self.lower:.2%} to {self.upper:.2%}), {counted}; {promise}"
        )


@dataclasses.dataclass(frozen=True)
class DrafterStats:
    """Counters of one drafter.

    Attributes:
      passes: passes that verified its drafts.
      drafted, accepted: drafts verified, and drafts accepted, over all rows.
    """

    passes: int
    drafted: int
    accepted: int


@dataclasses.dataclass(frozen=True)
class DraftSteps:
    """Measured times of passes and drafts, in steps: passes over one token, without earlier tokens.

    Attributes:
      passes: a pass, by the number of a row's tokens in it.
      drafts: a draft, by drafter; 0 for drafters that copy.
      attention: what each pass and each draft of a model takes more, for 1,000 earlier tokens.
    """

    passes: dict[int, float]
    drafts: dict[str, float]
    attention: float

    def summary(self) -> str:
        """One line to print."""
        costs = [f"a pass over {width} tokens {steps:.2f}" for width, steps in self.passes.items() if width > 1]
        costs += [f"a draft of the {name} {steps:.2f}" for name, steps in self.drafts.items() if steps > 0]
        costs += [f"{self.attention:.2f} more for each after 1,000 tokens"] if self.attention >= 0.005 else []
        return f"in steps: {', '.join(costs)}"


@dataclasses.dataclass(frozen=True)
class DraftStats:
    """What ``mode="lossless"`` drafted, summed over all rows, and why.

    Attributes:
      passes: passes of the full model, prefill included.
      by_drafter: counters of each drafter, by name.
      steps: the costs that the choice between them was made with.
    """

    passes: int
    by_drafter: dict[str, DrafterStats]
    steps: DraftSteps

    @property
    def drafted(self) -> int:
        """Drafts verified."""
        return sum(each.drafted for each in self.by_drafter.values())

    @property
    def accepted(self) -> int:
        """Drafts accepted."""
        return sum(each.accepted for each in self.by_drafter.values())

    def summary(self) -> str:
        """One line to print."""
        plain = self.passes - 1 - sum(each.passes for each in self.by_drafter.values())  # without the prompt's pass
        parts = [
            f"{name}: {each.accepted} of {each.drafted} drafts accepted, {each.accepted / each.passes:.1f} in each of "
            f"{each.passes} passes"
            for name, each in self.by_drafter.items()
            if each.passes
        ]
        return "; ".join(
            [f"lossless: {self.passes} passes, {plain} of them without drafts", *parts, self.steps.summary()]
        )


@dataclasses.dataclass(frozen=True)
class ExitStats:
    """Depth and time of a generation or a scoring call.

    Attributes:
      num_layers: layers of the model.
      tokens: tokens counted: generated tokens, or scored ones.
      layers_run: layers that these tokens ran, summed over tokens.
      exits_per_layer: for each layer, the tokens whose last layer it was.
      layers_executed: layers the device ran, summed over steps. With one row it equals `layers_run`; with more, a step
        costs the depth of its deepest row. With ``kv_strategy="recompute"``, it includes layers that ran only for
        waiting tokens. With ``mode="lossless"``, a layer counts once for each pass, however many drafts it verifies.
      steps: forward passes that produced tokens.
      wall_time: seconds, without compilation.
      compile_time: seconds spent compiling for this call (and, with ``mode="lossless"``, measuring the costs of
        passes); 0.0 if the program was already compiled.
      drift: report of the call's `DriftMonitor`, this call included; None without a monitor.
      drafts: draft counters with ``mode="lossless"``; otherwise None.
    """

    num_layers: int
    tokens: int
    layers_run: int
    exits_per_layer: tuple[int, ...]
    layers_executed: int
    steps: int
    wall_time: float
    compile_time: float = 0.0
    drift: DriftReport | None = None
    drafts: DraftStats | None = None

    @classmethod
    def from_exit_layers(
        cls,
        exit_layers: Int[np.ndarray, "..."],
        *,
        num_layers: int,
        layers_executed: int,
        steps: int,
        wall_time: float,
        compile_time: float = 0.0,
    ) -> ExitStats:
        """Builds the statistics from exit layers; entries of -1 are not tokens."""
        flat = np.asarray(exit_layers).reshape(-1)
        flat = flat[flat >= 0]
        return cls(
            num_layers=num_layers,
            tokens=int(flat.size),
            layers_run=int(flat.sum() + flat.size),
            exits_per_layer=tuple(int(n) for n in np.bincount(flat, minlength=num_layers)),
            layers_executed=int(layers_executed),
            steps=int(steps),
            wall_time=float(wall_time),
            compile_time=float(compile_time),
        )

    @property
    def layers_per_token(self) -> float:
        """Mean layers run per token."""
        return self.layers_run / self.tokens if self.tokens else 0.0

    @property
    def depth(self) -> float:
        """Mean share of the layers that tokens ran."""
        return self.layers_per_token / self.num_layers

    @property
    def full_depth_tokens(self) -> int:
        """Tokens that ran every layer."""
        return self.exits_per_layer[-1]

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second of wall clock."""
        return self.tokens / self.wall_time if self.wall_time > 0 else 0.0

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values, derived ones included."""
        return dataclasses.asdict(self) | {
            "layers_per_token": self.layers_per_token,
            "depth": self.depth,
            "full_depth_tokens": self.full_depth_tokens,
            "tokens_per_second": self.tokens_per_second,
        }

    def summary(self) -> str:
        """A few lines to print."""
        exits = ", ".join(f"layer {i}: {n}" for i, n in enumerate(self.exits_per_layer) if n)
        executed = self.layers_executed / self.steps if self.steps else 0.0
        lines = [
            f"{self.tokens} tokens in {self.wall_time:.2f} s: {self.tokens_per_second:.1f} tokens/s",
            f"layers run per token: {self.layers_per_token:.2f} of {self.num_layers} (depth {self.depth:.1%}); "
            f"executed per step: {executed:.2f}",
            f"ran all layers: {self.full_depth_tokens} of {self.tokens} tokens",
            f"last layer run: {exits or 'none'}",
        ]
        lines += [part.summary() for part in (self.drafts, self.drift) if part is not None]
        return "\n".join(lines)
