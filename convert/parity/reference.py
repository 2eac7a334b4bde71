"""transformers' side of `convert.parity.measure`: logits, states, cached steps and greedy text of a small batch."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

LENGTHS = (20, 20, 13, 9)
"""Real tokens of each row. Rows end together, and all are longer than `convert.parity.tiny`'s sliding windows (7)."""
WHOLE_ROWS = 2
"""Leading rows without padding."""
NEW_TOKENS = 16
_COUNTS_FROM_ZERO = ("bamba",)
"""Model types whose `forward` counts positions from zero at every call, if it is not told them."""
_FIRST_TOKEN = 4  # special tokens have smaller ids


class Batch(NamedTuple):
    """Tokens [B, T], their positions (-1 for padding), and which are real."""

    tokens: np.ndarray
    positions: np.ndarray
    mask: np.ndarray

    def column(self, index: int) -> Batch:
        """Returns one token of each row."""
        return Batch(*(a[:, index : index + 1] for a in self))

    def last(self, rows: np.ndarray, columns: int) -> Batch:
        """Returns the trailing columns of some rows."""
        return Batch(*(a[rows, -columns:] for a in self))


def random_batch(vocab: int) -> Batch:
    """Random tokens in rows of `LENGTHS`, padded on the left."""
    longest = max(LENGTHS)
    mask = np.arange(longest)[None] >= longest - np.array(LENGTHS)[:, None]
    tokens = np.random.default_rng(7).integers(_FIRST_TOKEN, vocab, mask.shape)
    positions = np.where(mask, np.cumsum(mask, axis=1) - 1, -1)
    return Batch(tokens.astype(np.int32), positions.astype(np.int32), mask)


class Reference:
    """transformers' float32 model of a checkpoint on disk.

    Args:
      checkpoint: path of the checkpoint.
      as_one_batch: run the batch as one, padded; otherwise each length separately, like a user with one prompt.
    """

    def __init__(self, checkpoint: str | Path, as_one_batch: bool) -> None:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

        self._torch = torch
        # Falcon's eager attention adds its linear biases twice.
        kind = (
            "sdpa"
            if AutoConfig.from_pretrained(checkpoint, trust_remote_code=False).model_type == "falcon"
            else "eager"
        )
        self._together = as_one_batch
        self._model: Any = AutoModelForCausalLM.from_pretrained(
            checkpoint, dtype=torch.float32, attn_implementation=kind
        ).eval()
        # Plain greedy choice: some families force tokens or stop at them.
        self._model.generation_config = GenerationConfig(do_sample=False, pad_token_id=0)

    def logits_and_states(self, batch: Batch, layer: int) -> tuple[np.ndarray, np.ndarray]:
        """Logits [B, T, V] and the residual stream after a layer [B, T, D]; zeros for padding."""
        outputs: dict[str, np.ndarray] = {}

        def watch(name: str, module: Any) -> Any:
            def hook(_module: Any, _inputs: Any, output: Any) -> None:
                outputs.setdefault(name, (output[0] if isinstance(output, (tuple, list)) else output).numpy())

            return module.register_forward_hook(hook)

        handles = [watch(name, module) for name, module in self._nth_modules(layer)]
        logits, states = [], []
        for rows in self._split_batch(batch):
            outputs.clear()
            logits.append(self._run(rows))
            states.append(outputs[min(outputs, key=lambda name: name.count("."))])
        for handle in handles:
            handle.remove()
        return _join_padded(logits), _join_padded(states)

    def steps(self, batch: Batch) -> np.ndarray | None:
        """Logits of rows without padding, one token at a time through transformers' cache; None if it has no cache."""
        cache, logits, name = None, [], cache_name(self._model)
        for position, column in enumerate(self._to_ids(batch.tokens[:WHOLE_ROWS]).T[:, :, None]):
            inputs = {name: cache}
            if self._model.config.model_type in _COUNTS_FROM_ZERO:
                inputs["position_ids"] = self._torch.full_like(column, position)
            with self._torch.no_grad():
                out = self._model(input_ids=column, **inputs, use_cache=True)
            cache = getattr(out, name, None)
            if cache is None:
                return None
            logits.append(out.logits.numpy())
        return np.concatenate(logits, axis=1)

    def greedy(self, batch: Batch) -> np.ndarray:
        """Returns `NEW_TOKENS` greedy tokens after each row without padding.

        They come from `generate` if its text agrees with logits computed without a cache. It does not in families whose
        `forward` starts positions at another number than `generate`; there, each token comes from a pass over the text.
        """
        prompt = self._to_ids(batch.tokens[:WHOLE_ROWS])
        text = self._model.generate(prompt, max_new_tokens=NEW_TOKENS)
        if not self._together and not bool(
            (self._best_tokens(text)[:, -NEW_TOKENS - 1 : -1] == text[:, -NEW_TOKENS:]).all()
        ):
            text = prompt
            for _ in range(NEW_TOKENS):
                text = self._torch.cat([text, self._best_tokens(text)[:, -1:]], dim=1)
        return text.numpy()[:, prompt.shape[1] :]

    def _best_tokens(self, ids: Any) -> Any:
        """Most probable next token after each token."""
        with self._torch.no_grad():
            return self._model(input_ids=ids).logits.argmax(-1)

    def _split_batch(self, batch: Batch) -> list[Batch]:
        """Batches to run at once: rows of equal length, or the whole batch."""
        if self._together:
            return [batch]
        lengths = batch.mask.sum(axis=1)
        return [batch.last(np.flatnonzero(lengths == n), int(n)) for n in dict.fromkeys(lengths.tolist())]

    def _run(self, batch: Batch) -> np.ndarray:
        inputs = {}
        if not batch.mask.all():
            mask = self._torch.tensor(batch.mask.astype(np.int64))
            inputs = {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
        with self._torch.no_grad():
            return self._model(input_ids=self._to_ids(batch.tokens), **inputs).logits.numpy()

    def _to_ids(self, tokens: np.ndarray) -> Any:
        return self._torch.tensor(np.asarray(tokens, np.int64))

    def _nth_modules(self, index: int) -> list[tuple[str, Any]]:
        """Element `index` of every module list with as many elements as layers; one of them is the decoder layer.

        In some families two layers are one module. Then it is the module that ends with the layer.
        """
        count = self._model.config.get_text_config().num_hidden_layers
        lists = [(name, m) for name, m in self._model.named_modules() if type(m).__name__ == "ModuleList"]
        found = [(n, m) for n, m in lists if len(m) == count] or [(n, m) for n, m in lists if 2 * len(m) == count]
        return [(name, module[(index + 1) * len(module) // count - 1]) for name, module in found]


def cache_name(model: Any) -> str:
    """Name of the cache argument in a transformers model: `cache` from 5.24 on, `past_key_values` before."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def _join_padded(parts: list[np.ndarray]) -> np.ndarray:
    """Joins rows of several lengths in one array, padded on the left."""
    longest = max(part.shape[1] for part in parts)
    return np.concatenate([np.pad(part, ((0, 0), (longest - part.shape[1], 0), (0, 0))) for part in parts])
