"""Compares free-running greedy generation with exits to full depth, for scripts.bench.quality: quality and wall clock.

It generates one row at a time, as for an interactive user. Both programs run in turn on the same prompt, in an order
that changes from prompt to prompt. Time per token is the time of a long generation minus that of a one-token generation
by the same program, over the tokens between; this excludes prefill and start-up. The prompt, which runs at full depth,
predicts the first new token, so that token is not counted anywhere.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from tide_jax.exits.depth import run_depth
from tide_jax.exits.exits import Exits
from tide_jax.functional import generate_tokens
from tide_jax.generation.generate import Generated, Prompt, Request
from tide_jax.generation.sampling import make_sampling
from tide_jax.model.decoder import Decoder

_CHUNK = 64  # number of tokens whose logits are in memory at once
Row = dict[str, Any]


class Scores(NamedTuple):
    """The full model's scores of a generation's N counted tokens, each on the generated prefix.

    Attributes:
      agrees: whether the token is the full model's likeliest one.
      nll: negative log probability of the token.
    """

    agrees: np.ndarray
    nll: np.ndarray


class Run(NamedTuple):
    """One generation: new tokens; for each counted token its last layer and the layers that the device ran; seconds."""

    tokens: np.ndarray
    exit_layers: np.ndarray
    executed: np.ndarray
    seconds: float


class Generator:
    """Generates from prompts of one length, with and without exits.

    Args:
      prompts: token ids, all of one length.
      new_tokens: number of tokens per generation, at least 2; end-of-sequence tokens do not end it.
    """

    def __init__(self, model: Decoder, prompts: Sequence[Sequence[int]], new_tokens: int) -> None:
        self.model, self.new_tokens = model, new_tokens
        self.prompts = [np.asarray(ids, np.int32) for ids in prompts]
        self._program = jax.jit(generate_tokens, static_argnames="capacity")
        self._warm(None)
        self._full = [self._scores(ids, self._run(ids, None).tokens) for ids in self.prompts]

    def measure(self, exits: Exits, progress: Callable[[int, int], None] | None = None) -> Row:
        """Measures a strategy at one threshold; see `summarise`."""
        self._warm(exits)
        pairs, scores = [], []
        for number, ids in enumerate(self.prompts):
            order = (exits, None) if number % 2 == 0 else (None, exits)
            runs = {which is None: self._run(ids, which) for which in order}
            pairs.append((runs[False], runs[True]))
            scores.append(self._scores(ids, runs[False].tokens))
            if progress is not None:
                progress(number + 1, len(self.prompts))
        return summarise(pairs, scores, self._full, self.model.config.num_layers)

    def _warm(self, exits: Exits | None) -> None:
        self._generate(self.prompts[0], exits, 2)

    def _run(self, ids: np.ndarray, exits: Exits | None) -> Run:
        _, short = self._generate(ids, exits, 1)
        out, long = self._generate(ids, exits, self.new_tokens)
        seconds = (long - short) / (self.new_tokens - 1)
        counted = slice(1, self.new_tokens)
        layers, executed = np.asarray(out.exit_layers)[0, counted], np.asarray(out.layers_executed)[counted]
        return Run(np.asarray(out.tokens)[0, : self.new_tokens], layers, executed, seconds)

    def _generate(self, ids: np.ndarray, exits: Exits | None, count: int) -> tuple[Generated, float]:
        prompt = Prompt(jnp.asarray(ids[None]), jnp.full((1,), len(ids), jnp.int32))
        request = Request(
            sampling=make_sampling(),
            key=jax.random.key(0),
            eos=jnp.full((1, 1), -1, jnp.int32),
            pad=jnp.int32(0),
            max_new_tokens=jnp.int32(count),
        )
        start = time.perf_counter()
        out = jax.block_until_ready(self._program(self.model, prompt, request, exits, capacity=self.new_tokens))
        return out, time.perf_counter() - start

    def _scores(self, prompt: np.ndarray, new: np.ndarray) -> Scores:
        best, nll = _read(self.model, jnp.asarray(np.concatenate([prompt, new])[None]))
        counted = slice(len(prompt), len(prompt) + len(new) - 1)  # positions that predict all new tokens but the first
        return Scores(np.asarray(best)[counted] == new[1:], np.asarray(nll, np.float64)[counted])


def summarise(
    pairs: Sequence[tuple[Run, Run]], scores: Sequence[Scores], full: Sequence[Scores], num_layers: int
) -> Row:
    """Summarises depth, quality and time over prompts.

    Args:
      pairs: for each prompt, the run with exits and the paired run at full depth.
      scores, full: the full model's scores of the text with exits, and of its own text.
    """
    layers = np.concatenate([with_exits.exit_layers for with_exits, _ in pairs]) + 1
    depth = float(layers.mean() / num_layers)
    ratios = [with_exits.seconds / beside.seconds for with_exits, beside in pairs]
    time_ratio = statistics.median(ratios)
    skipped = 1.0 - depth
    means = [float(np.concatenate([s.nll for s in group]).mean()) for group in (scores, full)]
    return {
        "layers": float(layers.mean()),
        "depth": depth,
        "executed": float(np.concatenate([run.executed for run, _ in pairs]).mean() / num_layers),
        "agreement": float(np.concatenate([s.agrees for s in scores]).mean()),
        "full_agreement": float(np.concatenate([s.agrees for s in full]).mean()),
        "nll": means[0],
        "full_nll": means[1],
        "perplexity_ratio": float(np.exp(means[0] - means[1])),
        "tokens_per_second": 1.0 / statistics.median(run.seconds for run, _ in pairs),
        "full_tokens_per_second": 1.0 / statistics.median(run.seconds for _, run in pairs),
        "time_ratio": time_ratio,
        "time_ratios": ratios,
        "speed_ratio": 1.0 / time_ratio,
        "gain_per_skipped": (1.0 - time_ratio) / skipped if skipped > 0 else None,
        "tokens": int(layers.size),
    }


@jax.jit
def _read(model: Decoder, tokens: Int[Array, "1 T"]) -> tuple[Int[Array, " T"], Float[Array, " T"]]:
    """Argmax after each token and negative log probability of the next one, at full depth."""
    positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    states = run_depth(model, tokens, positions, None).states[0]

    def one(arguments: tuple[Array, Array]) -> tuple[Array, Array]:
        state, following = arguments
        logits = model.logits(state[None, None])[0, 0].astype(jnp.float32)
        return jnp.argmax(logits).astype(jnp.int32), -jax.nn.log_softmax(logits)[following]

    return lax.map(one, (states, jnp.roll(tokens[0], -1)), batch_size=_CHUNK)
