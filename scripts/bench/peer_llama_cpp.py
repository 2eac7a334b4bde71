"""llama.cpp's side of scripts.bench.llama_cpp: decoding and reading prompts in C, through llama-cpp-python."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np

TYPES = {"F32": llama_cpp.LLAMA_FTYPE_ALL_F32, "Q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0}
"""Storage types to compare."""
_KEPT: list[Any] = []  # keeps callbacks alive as long as the process


def silence() -> None:
    """Silences llama.cpp, which writes hundreds of lines to standard error."""
    quiet = llama_cpp.llama_log_callback(lambda *_: None)
    _KEPT.append(quiet)
    llama_cpp.llama_log_set(quiet, ctypes.c_void_p(0))


def stored_as(source: Path, destination: Path, kind: str, threads: int) -> None:
    """Writes a GGUF file whose weights all have one type. Raises RuntimeError if llama.cpp refuses."""
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.nthread, settings.ftype, settings.allow_requantize = threads, TYPES[kind], True
    if llama_cpp.llama_model_quantize(str(source).encode(), str(destination).encode(), ctypes.byref(settings)):
        raise RuntimeError(f"llama.cpp cannot store {source} as {kind}")


class Model:
    """A model with a cache for several sequences.

    Args:
      path: GGUF file.
      slots: largest number of tokens per sequence.
      sequences: number of sequences at once.
      threads: number of threads, as for tide_jax.
    """

    def __init__(self, path: Path, slots: int, sequences: int, threads: int) -> None:
        settings = llama_cpp.llama_model_default_params()
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), settings)
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot load {path}")
        context = llama_cpp.llama_context_default_params()
        context.n_ctx, context.n_batch, context.n_ubatch = slots * sequences, 512, 512
        context.n_seq_max, context.n_threads, context.n_threads_batch = sequences, threads, threads
        self._context = llama_cpp.llama_init_from_model(self._model, context)
        if not self._context:
            raise RuntimeError(f"llama.cpp cannot run {path}")
        self._vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._batch = llama_cpp.llama_batch_init(512, 0, 1)

    def clear(self) -> None:
        """Clears the cache."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)

    def read(self, tokens: np.ndarray, sequences: np.ndarray, positions: np.ndarray, asked: np.ndarray) -> list[int]:
        """Runs tokens at their sequences and positions; returns the likeliest next token for each one in `asked`."""
        batch = self._batch
        batch.n_tokens = len(tokens)
        for i in range(len(tokens)):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = int(tokens[i]), int(positions[i]), 1
            batch.seq_id[i][0], batch.logits[i] = int(sequences[i]), int(asked[i])
        if code := llama_cpp.llama_decode(self._context, batch):
            raise RuntimeError(f"llama_decode failed with {code}")
        found = []
        for i in np.flatnonzero(asked):
            logits = llama_cpp.llama_get_logits_ith(self._context, int(i))
            found.append(int(np.argmax(np.ctypeslib.as_array(logits, (self._vocabulary,)))))
        return found


def decoding(model: Model, prompts: np.ndarray, steps: int) -> Callable[[], float]:
    """Returns a function that measures seconds per greedy step over a batch of prompts [B, T]."""
    rows, length = prompts.shape
    numbers, every = np.arange(rows), np.ones(rows, bool)

    def run() -> float:
        model.clear()
        for row in numbers:
            last = model.read(prompts[row], np.full(length, row), np.arange(length), np.arange(length) == length - 1)
        tokens = np.repeat(last, rows)
        start = time.perf_counter()
        for step in range(steps):
            tokens = np.array(model.read(tokens, numbers, np.full(rows, length + step), every))
        return (time.perf_counter() - start) / steps

    run()
    return run


def prompt_reading(model: Model, prompt: np.ndarray) -> Callable[[], float]:
    """Returns a function that measures seconds to the first token of one prompt [T]."""
    length = len(prompt)

    def run() -> float:
        model.clear()
        start = time.perf_counter()
        model.read(prompt, np.zeros(length, int), np.arange(length), np.arange(length) == length - 1)
        return time.perf_counter() - start

    return run
