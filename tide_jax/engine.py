"""TIDE: the engine that generates and scores text with a model, its routers and an exit configuration."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import PRNGKeyArray

from pallas_kernels.exit_step import IMPLEMENTATIONS
from tide_jax.checks import instance_of
from tide_jax.config import ExitConfig, Mode
from tide_jax.drift.monitor import Auditor, DriftMonitor, FinishedSequence, generated_sequences, scored_sequences
from tide_jax.errors import TideError
from tide_jax.exits.deferred_fill import is_faster
from tide_jax.exits.exits import Exits
from tide_jax.exits.router import Routers
from tide_jax.generation.batch import prompt_column, to_rows
from tide_jax.generation.calls import make_call
from tide_jax.generation.driver import Call, Decoding, PlainDecoding, collect_steps, run_steps, stream_to
from tide_jax.generation.outputs import GenerateOutput, ScoreOutput, StreamStep
from tide_jax.generation.programs import MOST_PROGRAMS, Programs
from tide_jax.generation.scoring import score_rows
from tide_jax.generation.stats import ExitStats
from tide_jax.generation.stop_strings import Stops
from tide_jax.lossless.decoding import Learned, LosslessDecoding, check_draft
from tide_jax.model.decoder import Decoder
from tide_jax.model.sharding import check_mesh, mesh_of, shard

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
      cuda_graphs: on a GPU, True runs whole decode loops as CUDA graphs, False launches them from the host, and None
        takes graphs if a small loop of loops is right as a graph on this GPU (`tide_jax.generation.cuda_graphs`).

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
        cuda_graphs: bool | None = None,
    ) -> None:
        instance_of("model", model, Decoder)
        instance_of("routers", routers, Routers, or_none=True)
        instance_of("config", config, ExitConfig, or_none=True)
        self._mesh = mesh_of(model) if mesh is None else check_mesh(mesh)
        self.model = self._on_mesh(model)
        self.routers = routers
        self.config = config or ExitConfig(min_layers=min(ExitConfig.min_layers, model.config.num_layers))
        self.implementation = implementation
        self._weights = self._on_mesh(routers.without_metadata()) if routers is not None else None
        self.programs = Programs(self._mesh, most=max_programs, cuda_graphs=cuda_graphs)
        self._learned = Learned()
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
        other.programs, other._learned = self.programs, self._learned
        return other

    def generate(
        self,
        input_ids: Any,
        *,
        attention_mask: Any = None,
        mode: Mode | None = None,
        draft: str | None = None,
        max_new_tokens: int | None = None,
        max_length: int | None = None,
        do_sample: bool | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        eos_token_id: Any = None,
        pad_token_id: int | None = None,
        stop_strings: str | Sequence[str] | Stops | None = None,
        tokenizer: Any = None,
        generation_config: Any = None,
        key: PRNGKeyArray | None = None,
        streamer: Any = None,
        monitor: DriftMonitor | None = None,
        **rules: Any,
    ) -> GenerateOutput:
        """Continues prompts.

        Arguments not given come from `generation_config`, then from the checkpoint's generation_config.json: rules
        always, sampling settings only when sampling. Without `do_sample` or a temperature, decoding is greedy, whatever
        the checkpoint's `do_sample` says.

        Args:
          input_ids: int array [B, T] or [T], or a list of unequal lists.
          attention_mask: [B, T], 0 where `input_ids` is padding (on either side).
          mode: "exit" (default with routers), "full" (default without), or "lossless". "lossless" generates the tokens
            of "full", but verifies drafts where that is faster (`tide_jax.lossless.speculate`). Its first call at a
            batch size spends some seconds measuring the costs of passes.
          draft: who drafts with "lossless": "int8", the model's own weights rounded to 8 bits, made at the first call
            (one more byte a weight), beside the text; or "text", the text alone. Default: "int8" where it was measured
            to pay, else "text". It pays on one CPU with the extra `cpu`, for float32 weights beyond 64 MiB and up to 8
            rows, if the memory suffices.
          max_new_tokens: most tokens to generate, default 128; clipped at the end of the context, with a warning
            logged.
          max_length: most tokens of a row, its prompt included; ignored if `max_new_tokens` is given, too.
          do_sample: True samples, at temperature 1 unless another is set; False is greedy.
          temperature, top_k, top_p, min_p: sampling settings, see `tide_jax.generation.sampling`. A temperature above 0
            turns sampling on, 0 is greedy.
          repetition_penalty: see `tide_jax.generation.sampling`; 1 for none.
          eos_token_id: an id, a list of ids, or a list of ids for each row; default: the model's. ``[]`` for none.
          pad_token_id: id written after a row's end; default: the model's, else 0.
          stop_strings: a string or several; a row ends when its new text contains one. Its tokens stay in the result.
            Generation then runs step by step.
          tokenizer: decodes the text for `stop_strings`: an object with ``decode(ids)``.
          generation_config: settings under transformers' names: its `GenerationConfig` or a dictionary.
          key: random key, required for sampling.
          streamer: an object with ``put(array)`` and ``end()``, such as transformers' TextStreamer; one row only.
          monitor: audits a share of the finished rows; see `tide_jax.DriftMonitor`. Ignored without exits.
          rules: the other fields of `tide_jax.model.generation_settings.GenerationSettings`: `no_repeat_ngram_size`,
            `bad_words_ids`, `min_length`, `min_new_tokens`, `forced_bos_token_id`, `forced_eos_token_id`,
            `suppress_tokens`, `begin_suppress_tokens`. 0, -1 or ``[]`` turns off a rule of the checkpoint.

        Raises:
          TideError: invalid input; the message is one line.
        """
        call = self._call(
            input_ids,
            mode,
            attention_mask=attention_mask,
            max_new_tokens=max_new_tokens,
            max_length=max_length,
            do_sample=do_sample,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            eos_token_id=eos_token_id,
            pad_token_id=pad_token_id,
            stop_strings=stop_strings,
            tokenizer=tokenizer,
            generation_config=generation_config,
            key=key,
            **rules,
        )
        # Audits run as scoring does, so one compiled program serves every batch size.
        watched = None if monitor is None or mode == "lossless" else self.exits(mode)
        self._watch(monitor, watched)
        decoding, layers = self._decoding(mode, draft), self.model.config.num_layers
        if streamer is not None:
            out = stream_to(streamer, decoding, call, self.programs, layers)
        elif call.stops is not None:
            out = collect_steps(decoding, call, self.programs, layers)
        else:
            out = decoding.whole(call)
        # Hand the finished rows to the monitor, which runs some of them again at full depth.
        if monitor is None:
            return out
        finished = generated_sequences(
            out.prompts, out.tokens, out.lengths, prompt_exits=self.config.prefill_exits, greedy=call.takes_argmax
        )
        return out._replace(stats=self._audited(out.stats, monitor, watched, finished))

    def stream(
        self,
        input_ids: Any,
        *,
        attention_mask: Any = None,
        mode: Mode | None = None,
        draft: str | None = None,
        max_new_tokens: int | None = None,
        max_length: int | None = None,
        do_sample: bool | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        eos_token_id: Any = None,
        pad_token_id: int | None = None,
        stop_strings: str | Sequence[str] | Stops | None = None,
        tokenizer: Any = None,
        generation_config: Any = None,
        key: PRNGKeyArray | None = None,
        **rules: Any,
    ) -> Iterator[StreamStep]:
        """Yields the tokens of each step as soon as they are generated.

        Arguments and errors are those of `generate`; a `monitor` needs finished rows.
        """
        call = self._call(
            input_ids,
            mode,
            attention_mask=attention_mask,
            max_new_tokens=max_new_tokens,
            max_length=max_length,
            do_sample=do_sample,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            eos_token_id=eos_token_id,
            pad_token_id=pad_token_id,
            stop_strings=stop_strings,
            tokenizer=tokenizer,
            generation_config=generation_config,
            key=key,
            **rules,
        )
        return run_steps(self._decoding(mode, draft), call, self.programs)

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
        rows = to_rows(input_ids, attention_mask, self.model.config)
        prompt = prompt_column(prompt_lengths, len(rows.rows))
        exits = self.exits("full" if isinstance(mode, str) and mode == "lossless" else mode)
        self._watch(monitor, exits)
        out = score_rows(self.model, self.programs, self._mesh, rows, prompt, exits)
        return out._replace(stats=self._audited(out.stats, monitor, exits, scored_sequences(rows, prompt, out.logits)))

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
        deferred = (
            strategy == "propagate"
            and decoded_rows is not None
            and is_faster(self.model, decoded_rows, graphs=self.programs.loops_in_graphs)
        )
        return Exits(
            self._weights,
            jnp.asarray(thresholds, jnp.float32),
            jnp.int32(self.config.min_layers),
            kv_strategy=strategy,
            prompt=self.config.prefill_exits,
            deferred=deferred,
            implementation=self.implementation,
        )

    def _decoding(self, mode: Mode | None, draft: str | None) -> Decoding:
        check_draft(draft, mode)
        if mode == "lossless":
            return LosslessDecoding(self.model, self.programs, self._learned, draft)
        return PlainDecoding(self.model, self.programs)

    def _call(self, input_ids: Any, mode: Mode | None, **arguments: Any) -> Call:
        return make_call(self.model.config, self._mesh, lambda rows: self.exits(mode, rows), input_ids, **arguments)

    def _watch(self, monitor: DriftMonitor | None, exits: Exits | None) -> None:
        if not isinstance(monitor, DriftMonitor | None):
            raise TideError(f"monitor is {type(monitor).__name__}, expected a tide_jax.DriftMonitor")
        if monitor is not None and exits is not None:
            monitor.watch(self.config)

    def _audited(
        self, stats: ExitStats, monitor: DriftMonitor | None, exits: Exits | None, finished: list[FinishedSequence]
    ) -> ExitStats:
        if monitor is None:
            return stats
        if exits is not None:
            monitor.audit(finished, exits, Auditor(self.model, self.programs))
        return dataclasses.replace(stats, drift=monitor.report())

    def _on_mesh(self, tree: T) -> T:
        return tree if self._mesh is None else shard(tree, self._mesh)
