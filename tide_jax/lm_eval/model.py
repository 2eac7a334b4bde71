"""The model "tide" of lm-evaluation-harness (Gao et al. 2021): any of its tasks, with and without exits.

Importing this module registers the model; ``tide-jax eval`` imports it and then runs lm-eval's own command line.

>>> import lm_eval, tide_jax.lm_eval.model                                                    # doctest: +SKIP
>>> arguments = {"pretrained": "smollm2", "routers": "routers.safetensors", "exit_threshold": 0.9}  # doctest: +SKIP
>>> results = lm_eval.simple_evaluate(model="tide", model_args=arguments, tasks=["arc_easy"])  # doctest: +SKIP
>>> results["config"]["exits"]["depth"]                                                       # doctest: +SKIP
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

import jax
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import Collator, has_bos_prefix, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from tide_jax.checks import whole_number
from tide_jax.cli.progress import progress_bars
from tide_jax.config import KVStrategy, Mode
from tide_jax.engine import TIDE
from tide_jax.errors import TideError
from tide_jax.generation.stop_strings import Stops
from tide_jax.lm_eval.arguments import generation_arguments, open_engine, parse_number
from tide_jax.lm_eval.continuations import Continuation, Score, score_continuations
from tide_jax.lm_eval.depth import DepthCounts
from tide_jax.lossless.decoding import check_draft
from tide_jax.model.decoder import abstract_parameters
from tide_jax.model.files.checkpoint import load_tokenizer

logger = logging.getLogger(__name__)


@register_model("tide")
class TideLM(TemplateLM):
    """A decoder with its routers as a language model of lm-evaluation-harness.

    Tokenisation, truncation, windows and generation settings are those of lm-eval's model "hf". Results contain the
    layers that ran to predict each token, in total and by task, as ``results["config"]["exits"]``.

    Args:
      pretrained: anything that `tide_jax.load` takes, or a `TIDE` engine, which then provides routers and dials.
      tokenizer: anything that `tide_jax.load_tokenizer` takes, or a tokenizer; default: the model's.
      routers: file from `tide-jax calibrate`; without one, every layer runs.
      exit_threshold, min_layers, kv_strategy, threshold_tilt, prefill_exits: see `ExitConfig`; default: those promised
        in the router file, if any. Only with `prefill_exits` may the context's tokens exit, and so affect the
        prediction of a continuation's first token.
      mode: "exit" (default if there are routers), "full", or "lossless", which scores like "full" and generates the
        same tokens.
      draft: who drafts with "lossless", see `tide_jax.TIDE.generate`.
      dtype, weights: number formats of the model, see `tide_jax.load`.
      batch_size: rows per forward pass.
      max_length: tokens of a text that the model reads; default and upper limit: its context.
      max_gen_toks: number of new tokens if a task gives none.
      add_bos_token: whether texts start with the beginning-of-text token; None follows the tokenizer.
      prefix_token_id: token that conditions a text without context; default: the tokenizer's beginning-of-text token,
        or else its end-of-text token.
      enable_thinking: passed to the chat template.
      seed: for sampling, if a task samples.
      device, max_batch_size: ignored; lm-eval passes them to every model. JAX_PLATFORMS chooses the device, and there
        is no search for batch sizes.

    Raises:
      TideError: an argument is unknown or has an invalid value, or a file can't be loaded.
    """

    def __init__(
        self,
        pretrained: Any = None,
        *,
        tokenizer: Any = None,
        routers: str | None = None,
        exit_threshold: Any = None,
        min_layers: int | None = None,
        kv_strategy: KVStrategy | None = None,
        threshold_tilt: float | None = None,
        prefill_exits: bool | None = None,
        mode: Mode | None = None,
        draft: str | None = None,
        dtype: str | None = None,
        weights: str | None = None,
        batch_size: int | str = 8,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        enable_thinking: bool | None = None,
        seed: int = 0,
        device: str | None = None,
        max_batch_size: int | None = None,
        **unknown: Any,
    ) -> None:
        super().__init__()
        if unknown:
            raise TideError(f"the model tide has no argument {', '.join(sorted(unknown))}; see docs/evaluation.md")
        if pretrained is None:
            raise TideError("the model tide needs pretrained=DIRECTORY, as 'tide-jax convert' writes it")
        self.batch_size = whole_number("batch_size", parse_number(batch_size), 1)
        self.max_gen_toks = whole_number("max_gen_toks", max_gen_toks, 1)
        self._seed = whole_number("seed", seed)
        if not isinstance(add_bos_token, bool | None):
            raise TideError(f"add_bos_token={add_bos_token!r} must be True or False")
        self.add_bos_token = add_bos_token
        exit_settings = {
            "exit_threshold": exit_threshold,
            "min_layers": min_layers,
            "kv_strategy": kv_strategy,
            "threshold_tilt": threshold_tilt,
            "prefill_exits": prefill_exits,
        }
        given_settings = {name: value for name, value in exit_settings.items() if value is not None}
        check_draft(draft, mode)
        self.engine = open_engine(pretrained, routers, given_settings, mode, dtype, weights)
        self._draft = draft
        config = self.engine.model.config
        context = config.context_length
        self.max_length = context if max_length is None else whole_number("max_length", max_length, 2, context)
        if tokenizer is None and isinstance(pretrained, TIDE):
            raise TideError("an engine has no tokenizer; pass tokenizer=")
        source = pretrained if tokenizer is None else tokenizer
        self.tokenizer: Any = source if hasattr(source, "decode") else load_tokenizer(str(source))
        self._mode: Mode = mode or ("full" if self.engine.routers is None else "exit")
        last = config.vocab_size - 1
        self._prefix_token_id = (
            None if prefix_token_id is None else whole_number("prefix_token_id", prefix_token_id, 0, last)
        )
        self._template_variables = {} if enable_thinking is None else {"enable_thinking": enable_thinking}
        self._depth_counts = DepthCounts(config.num_layers)

    # --- lm-eval's interface -------------------------------------------------------------------------------------

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log-likelihood of each request's continuation given its context, and whether greedy decoding produces it."""
        scores = self._score([self._to_continuation(*request.args) for request in requests], disable_tqdm)
        answers = [(score.log_likelihood, score.greedy) for score in scores]
        for request, score, answer in zip(requests, scores, answers, strict=True):
            self._depth_counts.add(request.task_name, score.exit_layers)
            self.cache_hook.add_partial("loglikelihood", request.args, answer)
        exits = self._mode == "exit" and not self.engine.config.prefill_exits
        if exits and all(len(score.exit_layers) < 2 for score in scores):
            logger.warning(
                "every continuation is a single token, which the context predicts at full depth, so nothing could "
                "exit; prefill_exits=True lets the context exit"
            )
        self._depth_counts.log((request.task_name for request in requests), self._mode)
        return answers

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of each request's whole text, in windows of up to `max_length` tokens."""
        windows = [self._windows(request.args[0]) for request in requests]
        scores = iter(self._score([window for request_windows in windows for window in request_windows], disable_tqdm))
        totals: list[float] = []
        for request, request_windows in zip(requests, windows, strict=True):
            request_scores = [next(scores) for _ in request_windows]
            totals.append(sum(score.log_likelihood for score in request_scores))
            self._depth_counts.add(request.task_name, *(score.exit_layers for score in request_scores))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, totals[-1])
        self._depth_counts.log((request.task_name for request in requests), self._mode)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Each request's continuation as text, up to its first stop string."""
        order = Collator(
            list(enumerate(requests)),
            sort_fn=lambda pair: -len(self.tok_encode(pair[1].args[0])),
            group_by="gen_kwargs",
            group_fn=lambda pair: pair[1].arguments[1],
        )
        texts = [""] * len(requests)
        with progress_bars(disable=disable_tqdm or None) as progress:
            for number, chunk in enumerate(order.get_batched(n=self.batch_size)):
                for (index, request), text in zip(chunk, self._generate([r for _, r in chunk], number), strict=True):
                    texts[index] = text
                    self.cache_hook.add_partial("generate_until", request.args, text)
                progress("generate_until", (number + 1) * self.batch_size, len(requests))
        self._depth_counts.log((request.task_name for request in requests), self._mode)
        return texts

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as a prompt, in the tokenizer's chat template.

        Raises:
          TideError: the tokenizer has no chat template, or the template refuses the conversation.
        """
        if not getattr(self.tokenizer, "chat_template", None):
            raise TideError("the tokenizer has no chat template; run without --apply_chat_template")
        from jinja2 import TemplateError

        try:
            return self._apply_template(chat_history, add_generation_prompt)
        except TemplateError as error:
            # Some templates refuse system messages; try again without them.
            without = [message for message in chat_history if message["role"] != "system"]
            if len(without) == len(chat_history):
                raise TideError(f"the chat template refuses the conversation ({error})") from error
            logger.warning("the chat template refuses system messages; they are left out")
            return self._apply_template(without, add_generation_prompt)

    @property
    def tokenizer_name(self) -> str:
        """Name under which lm-eval caches requests."""
        return str(getattr(self.tokenizer, "name_or_path", type(self.tokenizer).__name__)).replace("/", "__")

    @property
    def eot_token_id(self) -> int | None:  # type: ignore[override]
        """The tokenizer's end-of-text token."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """Token that conditions a text without context."""
        candidates = (self._prefix_token_id, self.tokenizer.bos_token_id, self.tokenizer.eos_token_id)
        token_id = next((token for token in candidates if token is not None), None)
        if token_id is None:
            raise TideError("the tokenizer has neither a beginning- nor an end-of-text token; pass prefix_token_id=")
        return token_id

    def get_model_info(self) -> dict[str, Any]:
        """Information that lm-eval stores with the results: the exit dials and the layers that ran for each token."""
        model, config = self.engine.model, self.engine.config
        exit_settings = {
            "exit_threshold": config.exit_threshold,
            "min_layers": config.min_layers,
            "kv_strategy": config.kv_strategy,
            "threshold_tilt": config.threshold_tilt,
        }
        return {
            "model_num_parameters": sum(math.prod(shape) for shape in abstract_parameters(model.config).values()),
            "model_dtype": str(model.dtype),
            "model_weights": model.weights,
            "exits": {
                "mode": self._mode,
                **(exit_settings if self._mode == "exit" else {}),
                "prefill_exits": self._mode == "exit" and config.prefill_exits,
                **self._depth_counts.to_dict(),
            },
        }

    # --- tokens --------------------------------------------------------------------------------------------------

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids; by default with the tokenizer's special tokens, unless the text already starts with one."""
        if add_special_tokens is None and has_bos_prefix(string, self.tokenizer.decode([self.prefix_token_id])):
            add_special_tokens = False
        return self._encode(string, add_special_tokens)

    def _encode(self, string: str, add_special_tokens: bool | None) -> list[int]:
        special = self.add_bos_token if add_special_tokens is None else add_special_tokens
        first = self.tokenizer.bos_token_id
        if add_special_tokens is None and self.add_bos_token and first is not None:
            # With add_bos_token=True, transformers' tokenizers put this token first, whatever their own rule.
            return [first, *self.tokenizer.encode(string, add_special_tokens=False)]
        return list(self.tokenizer.encode(string, **({} if special is None else {"add_special_tokens": special})))

    def _encode_prompt(self, string: str) -> list[int]:
        """Token ids of a prompt to continue; as in the model "hf", only a beginning-of-text token counts as a start."""
        starts = has_bos_prefix(string, getattr(self.tokenizer, "bos_token", None))
        return self._encode(string, False if starts else None)

    def _loglikelihood_tokens(self, requests: Any, **_: Any) -> list[tuple[float, bool]]:
        pairs = [_check_pair(*texts, Continuation(context, tokens)) for texts, context, tokens in requests]
        return [(score.log_likelihood, score.greedy) for score in self._score(pairs, disable_tqdm=True)]

    def _to_continuation(self, context: str, continuation: str) -> Continuation:
        if context:
            return _check_pair(context, continuation, Continuation(*self._encode_pair(context, continuation)))
        tokens = self.tok_encode(continuation, add_special_tokens=False)
        pair = Continuation([self.prefix_token_id], tokens)
        if tokens[:1] == [self.prefix_token_id]:
            pair = Continuation(tokens[:1], tokens[1:])
        return _check_pair(context, continuation, pair)

    def _windows(self, text: str) -> list[Continuation]:
        windows = get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length, 1)
        return [Continuation(*make_disjoint_window(window)) for window in windows]

    def _apply_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool) -> str:
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
            **self._template_variables,
        )

    # --- the engine ----------------------------------------------------------------------------------------------

    def _score(self, continuations: Sequence[Continuation], disable_tqdm: bool) -> list[Score]:
        with progress_bars(disable=disable_tqdm or None) as progress:
            return score_continuations(
                self.engine,
                continuations,
                mode=self._mode,
                batch_size=self.batch_size,
                max_length=self.max_length,
                progress=lambda done, total: progress("loglikelihood", done, total),
            )

    def _generate(self, requests: list[Instance], number: int) -> list[str]:
        """Generates one batch, whose requests have the same generation arguments."""
        until, max_new_tokens, settings = generation_arguments(self.engine, requests[0].arguments[1], self.max_gen_toks)
        room = self.max_length - max_new_tokens
        if room < 1:
            raise TideError(
                f"max_gen_toks={max_new_tokens} leaves no room for a prompt in {self.max_length} tokens; lower it with "
                f"--gen_kwargs max_gen_toks={self.max_length // 2}"
            )
        end_of_text = self.eot_token_id
        # The end-of-text token also ends a text when spelled out. `min_new_tokens` cannot delay it, unlike the model's
        # end-of-sequence tokens.
        if end_of_text is not None:
            until = [*until, self._decode([end_of_text], special=True)]
        end_of_text_ids = frozenset[int]() if end_of_text is None else frozenset({end_of_text})
        out = self.engine.generate(
            [self._encode_prompt(request.args[0])[-room:] for request in requests],
            stop_strings=Stops(tuple(until), lambda tokens: self._decode(tokens, special=True), end_of_text_ids),
            mode=self._mode,
            draft=self._draft,
            max_new_tokens=max_new_tokens,
            key=jax.random.fold_in(jax.random.key(self._seed), number),
            **settings,
        )
        for request, exit_layers, length in zip(requests, out.exit_layers, out.lengths, strict=True):
            self._depth_counts.add(request.task_name, exit_layers[:length])
        return [postprocess_generated_text(self._decode(row.tolist()), until, None) for row in out.new_tokens]

    def _decode(self, tokens: list[int], *, special: bool = False) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=not special)


def _check_pair(context: str, continuation: str, pair: Continuation) -> Continuation:
    """Raises TideError if there is no token to score, or no token of context."""
    if pair.tokens and pair.context:
        return pair
    empty_part = "continuation" if pair.context else "context"
    raise TideError(
        f"the {empty_part} has no token of its own: ...{context[-30:]!r} and {continuation[:30]!r} are tokenised "
        "together, as lm-eval's model hf does; change the task's texts or its target_delimiter"
    )
