"""TIDE: the engine that generates and scores text with a model, its routers and an exit configuration."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from pallas_kernels.exit_step import IMPLEMENTATIONS
from tide_jax.checks import instance_of, whole_number
from tide_jax.config import ExitConfig, Mode
from tide_jax.drift.monitor import Auditor, DriftMonitor, Finished, generated, scored
from tide_jax.errors import TideError
from tide_jax.exits.deferred_fill import is_faster
from tide_jax.exits.depth import DepthOutput, run_depth
from tide_jax.exits.exits import Exits
from tide_jax.exits.router import Routers
from tide_jax.generation.batch import (
    Rows,
    bucket,
    eos_table,
    pad_left,
    pad_rows,
    positions_of,
    prompt_column,
    row_bucket,
    to_rows,
)
from tide_jax.generation.choice import choose
from tide_jax.generation.finite import check_finite, finite_rows
from tide_jax.generation.generate import Prompt, Request
from tide_jax.generation.logit_rules import make_rules
from tide_jax.generation.outputs import GenerateOutput, ScoreOutput, StreamStep
from tide_jax.generation.programs import MOST_PROGRAMS, Programs
from tide_jax.generation.running import Call, PlainRunner, Runner, stream_to
from tide_jax.generation.stats import ExitStats
from tide_jax.lossless.runner import Drafting, LosslessRunner
from tide_jax.model.decoder import Decoder
from tide_jax.model.sharding import DATA, checked_mesh, fetch, mesh_of, readable, shard, split_rows

logger = logging.getLogger(__name__)
T = TypeVar("T")


class TIDE:
    """Token-informed depth execution of a decoder.

    Args:
      model: the decoder, frozen.
      routers: trained routers; without them every call runs at full depth.
      config: thresholds, minimum depth and cache strategy.
      implementation: of the kernels around an exit, see `pallas_kernels`; None chooses by platform.
      mesh: devices to run on, from `tide_jax.make_mesh`. The model, routers and cache are split over the axis "model",
        rows over "data" if their number is divisible. None runs where the model lies, on a mesh if it was loaded onto
        one. With several processes (`jax.distributed`), all of them must make the same calls, and all get the results.
      max_programs: compiled programs to keep, shared by all engines that `with_config` makes of this one. Beyond that,
        the least recently used program is dropped, and compiled again when needed. Lengths, batch sizes and numbers of
        stop ids are rounded up so that calls share programs: a batch of up to 16 rows runs as it is, a larger one is
        rounded up in eight steps for each power of two.

    Attributes:
      model, routers, config, implementation: as given, the model on the mesh.
      programs: the compiled programs.

    Raises:
      TideError: the routers belong to a model of another depth or width; `min_layers` exceeds the depth; the number of
        thresholds is not that of the exit points; the implementation can't run here; or `mesh` lacks the axes "data"
        and "model".
    """

    def __init__(
        self,
        model: Decoder,
        routers: Routers | None = None,
        config: ExitConfig | None = None,
        *,
        implementation: str | None = None,
        mesh: Mesh | None = None,
        max_programs: int = MOST_PROGRAMS,
    ) -> None:
        instance_of("model", model, Decoder)
        instance_of("routers", routers, Routers, or_none=True)
        instance_of("config", config, ExitConfig, or_none=True)
        self._mesh = mesh_of(model) if mesh is None else checked_mesh(mesh)
        self.model = self._on_mesh(model)
        self.routers = routers
        self.config = config or ExitConfig(min_layers=min(ExitConfig.min_layers, model.config.num_layers))
        self.implementation = implementation
        self._weights = self._on_mesh(routers.without_metadata()) if routers is not None else None
        self.programs = Programs(self._mesh, most=max_programs)
        self._drafting = Drafting()
        self._check()

    def with_config(self, **changes: Any) -> TIDE:
        """A copy of the engine with other `ExitConfig` fields, sharing compiled programs.

        Only a new `kv_strategy` or `prefill_exits` recompiles. A `guarantee` is kept only if the settings it was
        certified for stay the same.

        Raises:
          TideError: unknown field, or an invalid value.
        """
        known = [field.name for field in dataclasses.fields(ExitConfig)]
        if unknown := sorted(set(changes) - set(known)):
            raise TideError(f"ExitConfig has no field {', '.join(unknown)}; expected some of {', '.join(known)}")
        other = TIDE(
            self.model,
            self.routers,
            dataclasses.replace(self.config, **changes),
            implementation=self.implementation,
            mesh=self._mesh,
        )
        other.programs, other._drafting = self.programs, self._drafting
        return other

    def generate(
        self,
        input_ids: Any,
        *,
        attention_mask: Any = None,
        max_new_tokens: int | None = None,
        mode: Mode | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        eos_token_id: Any = None,
        pad_token_id: int | None = None,
        key: PRNGKeyArray | None = None,
        streamer: Any = None,
        monitor: DriftMonitor | None = None,
        do_sample: bool | None = None,
        generation_config: Any = None,
        **rules: Any,
    ) -> GenerateOutput:
        """Continues prompts.

        Arguments not given come from `generation_config`, then from the checkpoint's generation_config.json: rules
        always, sampling settings only when sampling. Without `do_sample` or a temperature, decoding is greedy, whatever
        the checkpoint's `do_sample` says.

        Args:
          input_ids: int array [B, T] or [T], or a list of unequal lists.
          attention_mask: [B, T], 0 where `input_ids` is padding (on either side).
          max_new_tokens: most tokens to generate, default 128; clipped at the end of the context, with a warning
            logged.
          mode: "exit" (default with routers), "full" (default without), or "lossless". "lossless" generates the tokens
            of "full", but verifies drafts where that is faster (`tide_jax.lossless.speculate`). Its first call at a
            batch size spends some seconds measuring the costs of passes.
          temperature, top_k, top_p, min_p: sampling settings, see `tide_jax.generation.sampling`. A temperature above 0
            turns sampling on, 0 is greedy.
          repetition_penalty: see `tide_jax.generation.sampling`; 1 for none.
          eos_token_id: an id, a list of ids, or a list of ids for each row; default: the model's. ``[]`` for none.
          pad_token_id: id written after a row's end; default: the model's, else 0.
          key: random key, required for sampling.
          streamer: an object with ``put(array)`` and ``end()``, such as transformers' TextStreamer; one row only.
          monitor: audits a share of the finished rows; see `tide_jax.DriftMonitor`. Ignored without exits.
          do_sample: True samples, at temperature 1 unless another is set; False is greedy.
          generation_config: settings under transformers' names: its `GenerationConfig` or a dictionary.
          rules: the other fields of `tide_jax.model.generation_settings.GenerationSettings`: `no_repeat_ngram_size`,
            `bad_words_ids`, `min_length`, `min_new_tokens`, `forced_bos_token_id`, `forced_eos_token_id`,
            `suppress_tokens`, `begin_suppress_tokens`. 0, -1 or ``[]`` turns off a rule of the checkpoint.

        Raises:
          TideError: invalid input; the message is one line.
        """
        call = self._call(
            input_ids,
            attention_mask=attention_mask,
            max_new_tokens=max_new_tokens,
            mode=mode,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            eos_token_id=eos_token_id,
            pad_token_id=pad_token_id,
            key=key,
            do_sample=do_sample,
            generation_config=generation_config,
            **rules,
        )
        # Audits run as scoring does, so one compiled program serves every batch size.
        watched = None if monitor is None or mode == "lossless" else self.exits(mode)
        self._watch(monitor, watched)
        if streamer is not None and not all(callable(getattr(streamer, name, None)) for name in ("put", "end")):
            raise TideError(f"streamer is {type(streamer).__name__}, expected an object with put(array) and end()")
        runner = self._runner(mode)
        if streamer is None:
            out = runner.whole(call)
        else:
            out = stream_to(streamer, runner, call, self.programs, self.model.config.num_layers)
        # Hand the finished rows to the monitor, which runs some of them again at full depth.
        if monitor is None:
            return out
        prompts, prompt_exits = call.rows.rows, self.config.prefill_exits
        finished = generated(prompts, out.tokens, out.lengths, prompt_exits=prompt_exits, greedy=call.takes_argmax)
        return out._replace(stats=self._audited(out.stats, monitor, watched, finished))

    def stream(self, input_ids: Any, **arguments: Any) -> Iterator[StreamStep]:
        """Yields the tokens of each step as soon as they are generated.

        Arguments are those of `generate` without `streamer`, and without `monitor`, which needs finished rows.
        """
        call = self._call(input_ids, **arguments)
        return self._runner(arguments.get("mode")).steps(call)

    def __call__(
        self,
        input_ids: Any,
        *,
        attention_mask: Any = None,
        mode: Mode | None = None,
        prompt_lengths: Any = 0,
        monitor: DriftMonitor | None = None,
    ) -> ScoreOutput:
        """Scores all tokens of all rows in one pass, with the same exit decisions as decoding.

        Args:
          input_ids, attention_mask: as in `generate`.
          mode: "exit" (default with routers) or "full"; "lossless" scores like "full".
          prompt_lengths: number of leading tokens of each row, int or [B], that run at full depth, like a prompt in
            `generate`. The token at position 0 always does.
          monitor: as in `generate`.

        Raises:
          TideError: invalid input; the message is one line.
        """
        # Pad rows and columns to bucket sizes.
        rows = to_rows(input_ids, attention_mask, self.model.config)
        batch, width = rows.mask.shape
        positions = pad_rows(positions_of(rows.mask, bucket(width)), self._rows(batch), -1)
        tokens = np.zeros(positions.shape, np.int32)
        tokens[positions >= 0] = np.concatenate(rows.rows)
        prompt, exits = (
            prompt_column(prompt_lengths, batch),
            self.exits("full" if isinstance(mode, str) and mode == "lossless" else mode),
        )
        self._watch(monitor, exits)
        inputs = (
            jnp.asarray(tokens),
            jnp.asarray(positions),
            jnp.asarray(positions >= pad_rows(prompt, len(positions), 0)),
        )
        (out, logits, finite), seconds, compiled = self.programs.run(
            _score, (self.model,), (*split_rows(inputs, self._mesh), exits)
        )
        # Check the result, and cut the padding off.
        exit_layers, finite = fetch((out.exit_layers, finite))
        check_finite(finite[:batch], self.model.dtype)
        exit_layers = exit_layers[:batch, :width]
        stats = ExitStats.from_exit_layers(
            exit_layers,
            num_layers=self.model.config.num_layers,
            layers_executed=int(fetch(out.layers_executed)),
            steps=1,
            wall_time=seconds,
            compile_time=compiled,
        )
        logits = jnp.asarray(readable(logits))[:batch, :width]
        return ScoreOutput(logits, exit_layers, self._audited(stats, monitor, exits, scored(rows, prompt, logits)))

    def _check(self) -> None:
        config, layers = self.config, self.model.config.num_layers
        if reason := IMPLEMENTATIONS.refusal(self.implementation):
            raise TideError(reason)
        if config.min_layers > layers:
            raise TideError(f"min_layers={config.min_layers} exceeds the model's {layers} layers; lower it")
        if self.routers is None:
            return
        width = self.routers.routers[0].down.shape[0] if self.routers.routers else self.model.config.hidden_size
        if width != self.model.config.hidden_size or any(c >= layers - 1 for c in self.routers.exit_points):
            raise TideError(
                f"these routers are for hidden size {width} and exit points {list(self.routers.exit_points)}, the "
                f"model has hidden size {self.model.config.hidden_size} and {layers} layers; calibrate routers for it"
            )
        count = len(self.routers.exit_points)
        if isinstance(config.exit_threshold, tuple) and len(config.exit_threshold) != count:
            raise TideError(f"exit_threshold has {len(config.exit_threshold)} values, expected one or {count}")

    def exits(self, mode: Mode | None, decoded_rows: int | None = None) -> Exits | None:
        """Routers and settings as the pure functions take them; None for modes that run every layer.

        Args:
          mode: as in `generate`.
          decoded_rows: rows that a decode step will run; decides whether cache rows are projected together.

        Raises:
          TideError: no such mode, or `mode="exit"` without routers.
        """
        if not isinstance(mode, str | None) or mode not in (None, "exit", "lossless", "full"):
            raise TideError(f"mode={mode!r} is not known; choose 'exit', 'lossless' or 'full'")
        if mode == "exit" and self._weights is None:
            raise TideError("mode='exit' needs routers; pass them to TIDE(model, routers) or use mode='full'")
        if mode in ("full", "lossless") or self._weights is None:
            return None
        thresholds = self.config.thresholds(self._weights.exit_points, self.model.config.num_layers)
        strategy = self.config.kv_strategy
        deferred = strategy == "propagate" and decoded_rows is not None and is_faster(self.model, decoded_rows)
        return Exits(
            self._weights,
            jnp.asarray(thresholds, jnp.float32),
            jnp.int32(self.config.min_layers),
            kv_strategy=strategy,
            prompt=self.config.prefill_exits,
            deferred=deferred,
            implementation=self.implementation,
        )

    def _runner(self, mode: Mode | None) -> Runner:
        if mode == "lossless":
            return LosslessRunner(self.model, self.programs, self._drafting)
        return PlainRunner(self.model, self.programs)

    def _watch(self, monitor: DriftMonitor | None, exits: Exits | None) -> None:
        if not isinstance(monitor, DriftMonitor | None):
            raise TideError(f"monitor is {type(monitor).__name__}, expected a tide_jax.DriftMonitor")
        if monitor is not None and exits is not None:
            monitor.watch(self.config)

    def _audited(
        self, stats: ExitStats, monitor: DriftMonitor | None, exits: Exits | None, finished: list[Finished]
    ) -> ExitStats:
        if monitor is None:
            return stats
        if exits is not None:
            monitor.audit(finished, exits, Auditor(self.model, self.programs))
        return dataclasses.replace(stats, drift=monitor.report())

    def _call(
        self,
        input_ids: Any,
        *,
        attention_mask: Any = None,
        mode: Mode | None = None,
        key: PRNGKeyArray | None = None,
        **asked: Any,
    ) -> Call:
        # Check the prompts and resolve the generation settings.
        config = self.model.config
        rows = to_rows(input_ids, attention_mask, config)
        choice = choose(config.generation, **asked)
        sampling, eos_token_id, pad_token_id = choice.sampling, choice.eos_token_id, choice.pad_token_id
        if float(sampling.temperature) > 0 and key is None:
            raise TideError("sampling draws at random and needs key=jax.random.key(seed)")
        _check_key(key)
        if pad_token_id is not None:
            pad_token_id = whole_number("pad_token_id", pad_token_id, high=config.vocab_size - 1)
        pad = next((p for p in (pad_token_id, config.pad_token_id) if p is not None), 0)
        eos = eos_table(config.eos_token_ids if eos_token_id is None else eos_token_id, len(rows.rows))
        batch = self._rows(len(rows.rows))
        exits = self.exits(mode, batch)
        # After all other checks: this may log a warning, which should not precede an error.
        new = self._fit_context(rows, choice.max_new_tokens)
        request = Request(
            sampling=sampling,
            key=jax.random.key(0) if key is None else key,
            eos=jnp.asarray(pad_rows(eos, batch, -1)),
            pad=jnp.int32(pad),
            max_new_tokens=jnp.int32(new),
            rules=make_rules(choice.settings, config.vocab_size),
        )
        # Pad rows and columns to bucket sizes.
        width = bucket(int(rows.lengths.max()))
        lengths = pad_rows(rows.lengths, batch, 0)
        prompt = Prompt(jnp.asarray(pad_left(rows.rows, width, batch=batch)), jnp.asarray(lengths))
        return Call(rows, split_rows(prompt, self._mesh), request, exits, bucket(new))

    def _on_mesh(self, tree: T) -> T:
        return tree if self._mesh is None else shard(tree, self._mesh)

    def _rows(self, count: int) -> int:
        """Batch size of the compiled programs for `count` rows."""
        return row_bucket(count, 1 if self._mesh is None else self._mesh.shape[DATA])

    def _fit_context(self, rows: Rows, max_new_tokens: int) -> int:
        """Clips `max_new_tokens` to the row with most room in the context; each row ends at its own limit."""
        max_new_tokens = whole_number("max_new_tokens", max_new_tokens, low=1)
        context = self.model.config.context_length
        # The last new token never runs through the model, so it needs no position.
        room = context + 1 - rows.lengths.astype(np.int64)
        if clipped := int(np.sum(room < max_new_tokens)):
            logger.warning(
                "max_new_tokens=%d clipped to %d%s: the context holds %d tokens",
                max_new_tokens,
                room.min(),
                "" if len(room) == 1 else f" for the longest of {clipped} of the {len(room)} prompts",
                context,
            )
        return min(max_new_tokens, int(room.max()))


def _check_key(key: Any) -> None:
    """Raises TideError unless `key` is None or a single JAX key, of the new style or the old."""
    dtype, shape = getattr(key, "dtype", None), getattr(key, "shape", None)
    new = dtype is not None and jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key) and shape == ()
    if key is not None and not new and not (dtype == np.uint32 and shape in ((2,), (4,))):
        raise TideError(f"key is {type(key).__name__}, expected a single key: jax.random.key(seed)")


def _score(
    model: Decoder,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    may_exit: Array,
    exits: Exits | None,
) -> tuple[DepthOutput, Float[Array, "B T V"], Bool[Array, " B"]]:
    out = run_depth(model, tokens, positions, None, exits, may_exit=may_exit)
    logits, last = model.logits(out.states), jnp.argmax(positions, axis=1)[:, None, None]
    finite = finite_rows(jnp.take_along_axis(logits, last, axis=1)) & finite_rows(out.states, positions >= 0)
    return out, logits, finite | jnp.all(positions < 0, axis=1)
