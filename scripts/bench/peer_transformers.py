"""transformers' side of scripts.bench.peers. It imports nothing of tide_jax, to measure transformers' memory alone."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.nn import ModuleList

from scripts.bench.peer_measures import Run, Variant, cores


def load_peer(folder: Path, attention: str | None = None) -> Any:
    """Loads a `save_pretrained` folder in float32, with one thread per core and no end-of-text token.

    Args:
      attention: transformers' name of its implementation; None for its default.
    """
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    name = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False).architectures[0]
    model = (
        getattr(transformers, name).from_pretrained(folder, dtype=torch.float32, attn_implementation=attention).eval()
    )
    torch.set_num_threads(cores())
    model.generation_config.eos_token_id = None
    return model


def peer_variant(model: Any, name: str, *, longest: int, early_exit: int, lookup: int) -> Variant:
    """Returns transformers' `generate` in one of its modes.

    Args:
      longest: tokens of the longest generation, prompt included: capacity of the static cache.
      early_exit: layers that the assistant runs.
      lookup: tokens that prompt lookup drafts.
    """
    options: dict[str, Any] = {}
    if name == "compiled":
        options = {"cache_implementation": "static", "max_cache_len": longest, "compile_config": _compiling()}
    elif name == "assistant_early_exit":
        options = {"assistant_early_exit": early_exit}
    elif name == "prompt_lookup":
        options = {"prompt_lookup_num_tokens": lookup}

    def run(ids: list[int], count: int) -> Run:
        with _counted(model, hooked=name in ("assistant_early_exit", "prompt_lookup")) as counted:
            tokens, seconds = _generate(model, ids, count, options)
        if name == "compiled" and count > 1 and not hasattr(model, "_compiled_call"):
            raise RuntimeError("transformers did not compile its decoding step")
        return Run(tokens, seconds, counted[0] / len(tokens) if counted else float(model.config.num_hidden_layers))

    return run


def _generate(model: Any, ids: list[int], count: int, options: dict[str, Any]) -> tuple[list[int], float]:
    start = time.perf_counter()
    given = torch.tensor([ids])
    with torch.no_grad():
        out = model.generate(
            given,
            attention_mask=torch.ones_like(given),
            max_new_tokens=count,
            do_sample=False,
            pad_token_id=0,
            **options,
        )
    tokens = out[0, len(ids) :].tolist()
    return tokens, time.perf_counter() - start


def _compiling() -> Any:
    """Settings of `torch.compile`. transformers compiles only on accelerators unless told otherwise."""
    config = transformers.CompileConfig(mode="default")
    config._compile_all_devices = True
    return config


@contextlib.contextmanager
def _counted(model: Any, *, hooked: bool) -> Iterator[list[int]]:
    """Counts the layers that run if `hooked`, and restores the depth that a failed early exit leaves changed."""
    depth = model.config.num_hidden_layers
    calls = [0] if hooked else []

    def count(*_: Any) -> None:
        calls[0] += 1

    hooks = [layer.register_forward_pre_hook(count) for layer in _layers(model)] if hooked else []
    try:
        yield calls
    finally:
        model.config.num_hidden_layers = depth
        for hook in hooks:
            hook.remove()


def _layers(model: Any) -> Any:
    """The list of a transformers model's layers."""
    return next(m for m in model.modules() if isinstance(m, ModuleList) and len(m) == model.config.num_hidden_layers)
