"""The pure functions below `tide_jax.TIDE`, and the types in their signatures.

They take and return pytrees, keep no state, and can be jitted whole. Thresholds, sampling settings and lengths are
traced: changing them never recompiles. Shapes are static: choose the cache's capacity, and pad prompts on the left.

>>> import jax, jax.numpy as jnp
>>> import tide_jax.functional as F
>>> from tide_jax.testing import random_routers, tiny_config, tiny_decoder
>>> model = tiny_decoder(tiny_config(num_layers=4))
>>> exits = F.Exits.uniform(random_routers(model.config), 0.9, min_layers=1)

A whole generation in one program:

>>> prompt = F.Prompt(tokens=jnp.asarray([[0, 5, 7], [4, 5, 6]]), lengths=jnp.asarray([2, 3]))
>>> request = F.Request(
...     F.make_sampling(temperature=0.0), jax.random.key(0), eos=jnp.full((2, 1), -1), pad=jnp.int32(0),
...     max_new_tokens=jnp.int32(4),
... )
>>> out = jax.jit(F.generate_tokens, static_argnames="capacity")(model, prompt, request, exits, capacity=8)
>>> out.tokens.shape, out.lengths.tolist()
((2, 8), [4, 4])

The same by hand: fill a cache with the prompts, then decode token by token. Donate the cache.

>>> cache = F.init_cache(model.config, 2, 3 + 4, model.dtype, exits=exits)
>>> step = jax.jit(F.prefill)(model, prompt, cache, exits)
>>> decode = jax.jit(F.decode_step, donate_argnames="cache")
>>> tokens, positions, running = [], prompt.lengths, jnp.ones(2, bool)
>>> for _ in range(4):
...     tokens.append(jnp.argmax(step.logits, axis=1))
...     step = decode(model, step.cache, tokens[-1], positions, running, exits)
...     positions += 1
>>> bool((jnp.stack(tokens, axis=1) == out.tokens[:, :4]).all())
True

Lossless: the tokens of full depth, several drafts verified in a pass. The text drafts:

>>> costs = F.measure_pass_costs(model, batch=2, most_slots=2)
>>> lossless = jax.jit(F.generate_lossless, static_argnames=("capacity", "most_slots"))
>>> lossless(model, prompt, request, costs, capacity=8, most_slots=2).lengths.tolist()
[4, 4]

The model's weights rounded to 8 bits draft, too:

>>> drafters = (*F.TEXT_ONLY, F.TwinDrafter(F.make_twin(model)))
>>> costs = F.measure_pass_costs(model, drafters, batch=2, most_slots=2)
>>> lossless(model, prompt, request, costs, None, drafters, capacity=8, most_slots=2).counts.chosen.shape
(2,)
"""

from tide_jax.exits.depth import DepthOutput, run_depth
from tide_jax.exits.exits import Exits
from tide_jax.exits.queue import QueuedCache, init_cache
from tide_jax.exits.router import Router, Routers
from tide_jax.generation.generate import (
    Generated,
    GenerationState,
    Prompt,
    Request,
    StepOutput,
    advance,
    begin,
    decode_step,
    generate_tokens,
    prefill,
)
from tide_jax.generation.logit_rules import LogitRules, make_rules
from tide_jax.generation.sampling import Sampling, make_sampling, sample
from tide_jax.lossless.control import DraftControl, PassCosts
from tide_jax.lossless.costs import measure_pass_costs
from tide_jax.lossless.drafts import DraftedRows, Drafter, Drafts, TextDrafter
from tide_jax.lossless.speculate import (
    TEXT_ONLY,
    DraftCounts,
    LosslessGenerated,
    LosslessState,
    advance_lossless,
    begin_lossless,
    generate_lossless,
)
from tide_jax.lossless.twin import TwinDrafter, make_twin
from tide_jax.model.architecture import DecoderConfig
from tide_jax.model.attention.span import KeyValue
from tide_jax.model.cache import KVCache
from tide_jax.model.decoder import Decoder
from tide_jax.model.generation_settings import GenerationSettings

__all__ = [
    "TEXT_ONLY",
    "Decoder",
    "DecoderConfig",
    "DepthOutput",
    "DraftControl",
    "DraftCounts",
    "DraftedRows",
    "Drafter",
    "Drafts",
    "Exits",
    "Generated",
    "GenerationSettings",
    "GenerationState",
    "KVCache",
    "KeyValue",
    "LogitRules",
    "LosslessGenerated",
    "LosslessState",
    "PassCosts",
    "Prompt",
    "QueuedCache",
    "Request",
    "Router",
    "Routers",
    "Sampling",
    "StepOutput",
    "TextDrafter",
    "TwinDrafter",
    "advance",
    "advance_lossless",
    "begin",
    "begin_lossless",
    "decode_step",
    "generate_lossless",
    "generate_tokens",
    "init_cache",
    "make_rules",
    "make_sampling",
    "make_twin",
    "measure_pass_costs",
    "prefill",
    "run_depth",
    "sample",
]
