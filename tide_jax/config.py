"""Configuration of exits: exit settings, calibration settings, guarantees, and the layer groups between exit points.

The decoder's own configuration is `tide_jax.model.architecture.DecoderConfig`.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any, Literal

from tide_jax.checks import open_share, real_number, share, whole_number
from tide_jax.errors import TideError
from tide_jax.model.architecture import check_choice

ExitStrategy = Literal["identity", "affine"]
KVStrategy = Literal["propagate", "recompute"]
Label = Literal["agreement", "cosine"]
Mode = Literal["exit", "lossless", "full"]


@dataclasses.dataclass(frozen=True)
class RiskGuarantee:
    """A promise about exit settings, with the measurements behind it.

    With probability 1 - `delta` over the draw of the texts, the mean loss of a new text of the same kind is at most
    `risk`, for the model and routers of the measurement.

    Attributes:
      risk: promised mean loss of a text: a share of tokens ("disagreement"), nats ("nll"), or the callable's own unit.
      delta: probability that the promise fails.
      loss: "disagreement", "nll" or the callable's name.
      sequences, tokens: number of test texts, and of their counted tokens.
      p_value: p-value of the hypothesis that the risk is exceeded; at most `delta`.
      observed: mean loss of the test texts, in the unit of `risk`.
      depth: mean share of the layers that counted tokens ran.
      max_length: tokens read of each text.
      bound: increase of a text's mean loss at which "nll" is clipped, in nats; 1.0 for other losses.
      exit_threshold, threshold_tilt, min_layers, kv_strategy, prefill_exits: the `ExitConfig` fields that the promise
        is valid for; it is void for any others.

    Raises:
      TideError: a value outside its range.
    """

    risk: float
    delta: float
    loss: str
    sequences: int
    tokens: int
    p_value: float
    observed: float
    depth: float
    max_length: int
    exit_threshold: float | tuple[float, ...]
    min_layers: int
    bound: float = 1.0
    kv_strategy: str = "propagate"
    prefill_exits: bool = False
    threshold_tilt: float = 0.0

    def __post_init__(self) -> None:
        if isinstance(self.exit_threshold, list):  # from JSON
            object.__setattr__(self, "exit_threshold", tuple(self.exit_threshold))
        if not 0.0 < real_number("bound", self.bound) < math.inf:
            raise TideError(f"bound={self.bound!r} must be a number of nats above 0")
        if self.loss != "nll" and self.bound != 1.0:
            raise TideError(f"bound={self.bound!r} must be 1.0 for a loss other than nll")
        if not 0.0 < real_number("risk", self.risk) < self.bound:
            raise TideError(f"risk={self.risk!r} must lie between 0 and {self.bound:g}")
        if not 0.0 <= real_number("observed", self.observed) <= self.bound:
            raise TideError(f"observed={self.observed!r} is outside [0, {self.bound:g}]")
        open_share("delta", self.delta)
        for name in ("p_value", "depth", "threshold_tilt"):
            share(name, getattr(self, name))
        if self.exit_threshold == ():
            raise TideError("exit_threshold is empty; expected a number, or one for each exit point")
        for threshold in self.exit_threshold if isinstance(self.exit_threshold, tuple) else (self.exit_threshold,):
            share("exit_threshold", threshold)
        for name in ("sequences", "tokens", "max_length"):
            whole_number(name, getattr(self, name), 1, 2**63 - 1)
        whole_number("min_layers", self.min_layers)
        if not isinstance(self.prefill_exits, bool):
            raise TideError(f"prefill_exits={self.prefill_exits!r} must be True or False")
        for name in ("loss", "kv_strategy"):
            if not isinstance(value := getattr(self, name), str) or not value.isprintable():
                raise TideError(f"{name}={str(value)[:60]!r} must be a name")

    @property
    def settings(self) -> dict[str, Any]:
        """The fields of `ExitConfig` that the promise is valid for."""
        names = ("exit_threshold", "threshold_tilt", "min_layers", "kv_strategy", "prefill_exits")
        return {name: getattr(self, name) for name in names}

    def summary(self) -> str:
        """One line to print."""
        bound, observed = f"{self.risk:.4g}", f"{self.observed:.4g}"
        what = f"a mean loss ({self.loss}) of at most {bound}"
        if self.loss == "disagreement":
            bound, observed = f"{self.risk:.2%}", f"{self.observed:.2%}"
            what = f"at most {bound} of a text's tokens differ from the full model's, on average"
        if self.loss == "nll":
            what = f"a text's mean negative log-likelihood rises by at most {bound} nats, on average"
        threshold = _format_thresholds(self.exit_threshold)
        tilt = f", tilt {self.threshold_tilt:g}" if self.threshold_tilt else ""
        return (
            f"promised with {1 - self.delta:.4g} confidence: {what} (threshold {threshold}{tilt}, "
            f"{self.sequences} texts: {observed}, p-value {self.p_value:.3g}, mean depth {self.depth:.1%})"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-ready values; `from_dict` reads them back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> RiskGuarantee:
        """Inverse of `to_dict`.

        Raises:
          TideError: unknown or missing fields, invalid values, or a p-value above delta.
        """
        try:
            result = cls(**values)
        except TypeError as error:
            raise TideError(
                f"the guarantee can't be read ({error}): another version of tide_jax wrote it; measure it again"
            ) from error
        if result.p_value > result.delta:
            raise TideError(
                f"p_value={result.p_value!r} exceeds delta={result.delta!r}, so the guarantee is void; measure it again"
            )
        return result


@dataclasses.dataclass(frozen=True)
class ExitConfig:
    """Exit settings of the engine; only `kv_strategy` and `prefill_exits` recompile when they change.

    Attributes:
      exit_threshold: a token exits at the first exit point where its score exceeds the threshold, in [0, 1]; one
        number, or one for each exit point. The score is the router's. With a second look it is the second look's score
        for tokens that pass the router's screen; the others stay.
      min_layers: layers that every token runs at least.
      kv_strategy: how the cache of skipped layers is filled. "propagate" projects keys and values from the exit state,
        at the token's true position (CALM, Schuster et al. 2022, section 3.3). "recompute" keeps exit states and runs
        the skipped layers for all of them at once when a later token needs these layers, or many wait. Keys and values
        are then the full model's, so an exit affects nothing but its own answer.
      prefill_exits: lets prompt tokens exit, too. By default the prompt runs at full depth. A layer is skipped only
        once all of the prompt's tokens have exited, so this is for measuring what exits change, as in lm-eval's scores
        of single tokens, not for saving time.
      guarantee: the promise that `tide_jax.guarantee` certified for exactly these settings; dropped for any others.
      threshold_tilt: how much higher the threshold of a deep exit point is than that of a shallow one, in [0, 1];
        requires a single number as `exit_threshold`. At 0 all thresholds are `exit_threshold`. At 1 the allowed
        probability of error is in proportion to the layers that exiting there saves, and `exit_threshold` applies
        halfway through the model (see `tilt_thresholds`).
    """

    exit_threshold: float | tuple[float, ...] = 0.85
    min_layers: int = 8
    kv_strategy: KVStrategy = "propagate"
    prefill_exits: bool = False
    guarantee: RiskGuarantee | None = None
    threshold_tilt: float = 0.0

    def __post_init__(self) -> None:
        if isinstance(self.exit_threshold, (tuple, list)):
            thresholds = tuple(share("exit_threshold", value) for value in self.exit_threshold)
            object.__setattr__(self, "exit_threshold", thresholds)
        else:
            object.__setattr__(self, "exit_threshold", share("exit_threshold", self.exit_threshold))
        object.__setattr__(self, "threshold_tilt", share("threshold_tilt", self.threshold_tilt))
        if self.threshold_tilt and isinstance(self.exit_threshold, tuple):
            raise TideError(
                "threshold_tilt needs a single exit_threshold; pass one number, or several with threshold_tilt=0"
            )
        object.__setattr__(self, "min_layers", whole_number("min_layers", self.min_layers))
        if not isinstance(self.prefill_exits, bool):
            raise TideError(f"prefill_exits={self.prefill_exits!r} must be True or False")
        check_choice("kv_strategy", self.kv_strategy, KVStrategy)
        if not isinstance(self.guarantee, RiskGuarantee | None):
            raise TideError(f"guarantee={self.guarantee!r} must be a RiskGuarantee or None")
        # `dataclasses.replace` runs this, too, so it can't carry a promise over to other settings.
        if self.guarantee is not None and any(getattr(self, n) != v for n, v in self.guarantee.settings.items()):
            object.__setattr__(self, "guarantee", None)

    def thresholds(self, exit_points: tuple[int, ...], num_layers: int) -> tuple[float, ...]:
        """Exit threshold at each exit point."""
        if isinstance(self.exit_threshold, tuple):
            return self.exit_threshold
        return tilt_thresholds(self.exit_threshold, self.threshold_tilt, exit_points, num_layers)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-ready values; `from_dict` reads them back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ExitConfig:
        """Inverse of `to_dict`.

        Raises:
          TideError: unknown fields, or invalid values.
        """
        if not isinstance(values, dict):
            raise TideError(
                f"the exit settings are {str(values)[:60]!r}, expected an object with fields; calibrate again"
            )
        values = dict(values)
        if values.get("guarantee") is not None:
            values["guarantee"] = RiskGuarantee.from_dict(values["guarantee"])
        try:
            return cls(**values)
        except TypeError as error:
            raise TideError(
                f"the exit settings can't be read ({error}): another version of tide_jax wrote them; calibrate again"
            ) from error


@dataclasses.dataclass(frozen=True)
class CalibrationConfig:
    """Settings of calibration: how routers, exit heads and translators are fitted to a frozen model.

    Attributes:
      checkpoint_interval: layers between routers; there is never one after the last layer.
      calibration_samples: most texts to read.
      max_length: tokens read of each text.
      batch_size: texts in a forward pass.
      router_bottleneck_dim: hidden width of the router's MLP.
      exit_strategy: "identity" passes the exit state to the final norm unchanged; "affine" maps it with a fitted affine
        head first.
      exit_head_rank: rank of the affine heads' correction to the identity; None is full rank.
      exit_head_steps: gradient steps that tune affine heads on the full model's predictions after the closed-form fit
        (tuned lens); 0 for none.
      confidence_candidates: number of frequent tokens whose logits the second look computes; 0 lets the routers decide
        alone.
      translator_rank: rank of the maps from exit states to the inputs of skipped layers, from which keys and values are
        projected; 0 for shifts only, None projects from the exit state unchanged.
      label: a token counts as exitable where the exit's argmax equals the full model's ("agreement"), or where the
        exit state's cosine with the last state exceeds `convergence_threshold` ("cosine", the TIDE paper's).
      reservoir_bytes: memory for sampled hidden states; text that does not fit is sampled uniformly.
      validation_fraction: share of the text that is held out for validation and the report.
      learning_rate, weight_decay, max_epochs: AdamW settings of router training.
      patience: router training stops after this many epochs without improvement on validation text.
      exit_threshold, min_layers: exit settings that the report includes.
      seed: determines all randomness.
    """

    checkpoint_interval: int = 4
    calibration_samples: int = 2000
    max_length: int = 256
    batch_size: int = 8
    router_bottleneck_dim: int = 128
    exit_strategy: ExitStrategy = "affine"
    exit_head_rank: int | None = None
    exit_head_steps: int = 120
    confidence_candidates: int = 512
    translator_rank: int | None = 64
    label: Label = "agreement"
    convergence_threshold: float = 0.98
    reservoir_bytes: int = 384 * 2**20
    validation_fraction: float = 0.15
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    max_epochs: int = 30
    patience: int = 4
    exit_threshold: float = 0.85
    min_layers: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice("exit_strategy", self.exit_strategy, ExitStrategy)
        check_choice("label", self.label, Label)
        least = dict.fromkeys(("min_layers", "patience", "seed"), 0) | {"max_length": 2}  # position 0 is left out
        least |= dict.fromkeys(("exit_head_steps", "confidence_candidates", "translator_rank"), 0)
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type == "int" or (field.type == "int | None" and value is not None):
                whole_number(field.name, value, least.get(field.name, 1), 2**63 - 1)
        for name in ("convergence_threshold", "exit_threshold"):
            share(name, getattr(self, name))
        if not 0.0 < share("validation_fraction", self.validation_fraction) < 1.0:
            raise TideError(f"validation_fraction={self.validation_fraction!r} must lie between 0 and 1")
        for name in ("learning_rate", "weight_decay"):
            if not 0.0 <= real_number(name, getattr(self, name)) < float("inf"):
                raise TideError(f"{name}={getattr(self, name)!r} must be 0 or more")


def tilt_thresholds(threshold: float, tilt: float, exit_points: tuple[int, ...], num_layers: int) -> tuple[float, ...]:
    """Thresholds of all exit points from one threshold and a tilt.

    A score estimates the probability that exiting is right. To lose the least agreement for the layers saved, a token
    should exit where ``1 - score`` is below a price times the layers it would skip. This is the Lagrangian of that
    trade-off, ignoring that a later exit point may have a higher score. `threshold` sets the price: it is the threshold
    halfway through the model. `tilt` interpolates between one threshold for all (0) and this rule (1).

    >>> tilt_thresholds(0.8, 0.0, (1, 3, 5), 8)
    (0.8, 0.8, 0.8)
    >>> [round(t, 3) for t in tilt_thresholds(0.8, 1.0, (1, 3, 5), 8)]
    [0.7, 0.8, 0.9]
    """
    if not tilt:
        return (threshold,) * len(exit_points)
    saved = (1 - (c + 1) / num_layers for c in exit_points)
    return tuple(max(0.0, 1 - (1 - threshold) * (1 - tilt + 2 * tilt * part)) for part in saved)


def exit_point_layers(num_layers: int, interval: int) -> tuple[int, ...]:
    """Exit points: every `interval`-th layer, 0-based, but never the last, after which there is nothing to skip.

    >>> exit_point_layers(8, 4)
    (3,)
    >>> exit_point_layers(10, 4)
    (3, 7)
    """
    return tuple(range(interval - 1, num_layers - 1, interval))


def layer_groups(num_layers: int, exit_points: tuple[int, ...]) -> tuple[range, ...]:
    """Layer groups: the layers between two exit points, in order, which are skipped together.

    >>> layer_groups(6, (1, 3))
    (range(0, 2), range(2, 4), range(4, 6))
    """
    edges = [0, *(c + 1 for c in exit_points), num_layers]
    return tuple(range(a, b) for a, b in itertools.pairwise(edges))


def _format_thresholds(threshold: float | tuple[float, ...]) -> str:
    values = threshold if isinstance(threshold, tuple) else (threshold,)
    return " ".join(f"{value:.4g}" for value in values)
