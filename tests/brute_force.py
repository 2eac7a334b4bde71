"""Early exit, slowly: one token after the other, one layer after the other, in float64 NumPy.

Written from the definition and sharing no code with the library but the weights: no cache, no batch, no loop over
groups. Every step of a generation walks the whole row again.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np

from tide_jax.decoder import Decoder, parameters
from tide_jax.router import Routers

_erf = np.vectorize(math.erf)
_ACTIVATIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu": lambda x: 0.5 * x * (1 + _erf(x / math.sqrt(2))),
    "gelu_pytorch_tanh": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
}


@dataclasses.dataclass
class Walked:
    """A row after its walk.

    Attributes:
      logits: of the token after each token, [T, V].
      exit_layers: last layer each token ran, [T].
      margin: how close any score came to its threshold; below float32's accuracy the row decides nothing.
    """

    logits: np.ndarray
    exit_layers: list[int]
    margin: float


@dataclasses.dataclass
class BruteForce:
    """A model, its routers and its dials."""

    model: Decoder
    routers: Routers | None = None
    thresholds: float | Sequence[float] = 1.0
    min_layers: int = 0

    def __post_init__(self) -> None:
        self.config = self.model.config
        self.weights = {path: np.asarray(a, np.float64) for path, a in parameters(self.model).items()}

    def generate(
        self, prompt: list[int], new_tokens: int, *, prefill_exits: bool = False, eos: int = -1
    ) -> tuple[list[int], list[int], float]:
        """Greedy tokens, the exit layers of the tokens they were read from, and the margin."""
        row, walked = list(prompt), Walked(np.zeros(0), [], math.inf)
        while len(row) < len(prompt) + new_tokens and (row[-1] != eos or len(row) == len(prompt)):
            walked = self.walk(row, prompt_length=0 if prefill_exits else len(prompt))
            row.append(int(np.argmax(walked.logits[-1])))
        return row[len(prompt) :], walked.exit_layers[len(prompt) - 1 :], walked.margin

    def walk(self, row: list[int], prompt_length: int) -> Walked:
        """Runs a row; tokens before `prompt_length`, and the first one, run every layer."""
        keys: list[list[np.ndarray]] = [[] for _ in range(self.config.num_layers)]
        values: list[list[np.ndarray]] = [[] for _ in range(self.config.num_layers)]
        walked = Walked(np.zeros((len(row), self.config.vocab_size)), [], math.inf)
        for position, token in enumerate(row):
            x, state, left = self._embed(token, position), None, self.config.num_layers - 1
            for layer in range(self.config.num_layers):
                key, value = self._key_value(layer, x, position)
                keys[layer].append(key)
                values[layer].append(value)
                if state is not None:
                    continue  # it has left: only its keys and values go on
                x = self._layer(layer, x, position, keys[layer], values[layer])
                checkpoints = self.routers.checkpoints if self.routers is not None else ()
                if layer not in checkpoints or position < max(prompt_length, 1) or layer + 1 < self.min_layers:
                    continue
                c = checkpoints.index(layer)
                threshold = self.thresholds if isinstance(self.thresholds, float) else self.thresholds[c]
                score = self._score(c, x)
                walked.margin = min(walked.margin, abs(score - threshold))
                if score > threshold:
                    state, left = self._exit_state(c, x), layer
            walked.exit_layers.append(left)
            walked.logits[position] = self._logits(x if state is None else state)
        return walked

    def _score(self, c: int, x: np.ndarray) -> float:
        down, down_bias, up, up_bias = (np.asarray(a, np.float64) for a in self.routers.routers[c])
        hidden = _ACTIVATIONS["silu"](_rms(x, self.config.norm_eps) @ down + down_bias)
        return float(1 / (1 + np.exp(-(hidden @ up + up_bias))))

    def _exit_state(self, c: int, x: np.ndarray) -> np.ndarray:
        if self.routers.heads is None:
            return x
        head = self.routers.heads[c]
        normed = mapped = _rms(x, self.config.norm_eps)
        for factor in head.factors:
            mapped = mapped @ np.asarray(factor, np.float64)
        return normed + mapped + np.asarray(head.bias, np.float64)

    def _embed(self, token: int, position: int) -> np.ndarray:
        x = self.weights["embed.kernel"][token] * (self.config.embedding_scale or 1.0)
        return x + self.weights["positions.kernel"][position] if self.config.positions == "learned" else x

    def _logits(self, x: np.ndarray) -> np.ndarray:
        kernel = self.weights["embed.kernel" if self.config.tie_embeddings else "head.kernel"]
        logits = kernel @ self._norm("final_norm", x) + self.weights.get("head.bias", 0.0)
        return _softcap(logits, self.config.logit_softcap)

    def _layer(self, layer: int, x: np.ndarray, position: int, keys: list, values: list) -> np.ndarray:
        name = f"layers.{layer}"
        attended = self._norm(f"{name}.post_attention_norm", self._attend(layer, x, position, keys, values))
        middle = x if self.config.parallel_residual else x + attended
        fed = self._feed_forward(f"{name}.mlp", self._norm(f"{name}.pre_mlp_norm", middle))
        return x + attended + self._norm(f"{name}.post_mlp_norm", fed)

    def _attend(self, layer: int, x: np.ndarray, position: int, keys: list, values: list) -> np.ndarray:
        name, kind = f"layers.{layer}.attention", self.config.attention(layer)
        x = self._norm(f"layers.{layer}.pre_attention_norm", x)
        queries = self._rotate(layer, self._norm(f"{name}.q_norm", self._dense(f"{name}.q", x)), position)
        first = 0 if kind.window is None else max(0, position + 1 - kind.window)
        group = self.config.num_heads // self.config.num_kv_heads
        mixed = np.zeros_like(queries)
        for h, query in enumerate(queries):
            past = [key[h // group] for key in keys[first : position + 1]]
            scores = _softcap(np.array([kind.scale * (query @ key) for key in past]), self.config.attention_softcap)
            for weight, value in zip(_softmax(scores), values[first : position + 1], strict=True):
                mixed[h] += weight * value[h // group]
        return self._dense(f"{name}.out", mixed)

    def _key_value(self, layer: int, x: np.ndarray, position: int) -> tuple[np.ndarray, np.ndarray]:
        name = f"layers.{layer}.attention"
        both = self._dense(f"{name}.kv", self._norm(f"layers.{layer}.pre_attention_norm", x))
        return self._rotate(layer, self._norm(f"{name}.k_norm", both[:, 0]), position), both[:, 1]

    def _rotate(self, layer: int, heads: np.ndarray, position: int) -> np.ndarray:
        if (rope := self.config.attention(layer).rope) is None:
            return heads
        half = rope.rotary_dim // 2
        turn = np.exp(1j * position / rope.theta ** (np.arange(half) / half))
        turned = (heads[:, :half] + 1j * heads[:, half : 2 * half]) * turn
        return np.concatenate([turned.real, turned.imag, heads[:, 2 * half :]], axis=1)

    def _feed_forward(self, name: str, x: np.ndarray) -> np.ndarray:
        act = _ACTIVATIONS[self.config.activation]
        if self.config.moe is None:
            if not self.config.mlp_gated:
                return self._dense(f"{name}.down", act(self._dense(f"{name}.up", x)))
            gate, up = self._dense(f"{name}.gate_up", x)
            return self._dense(f"{name}.down", act(gate) * up)
        shares = _softmax(x @ self.weights[f"{name}.router.kernel"])
        best = np.argsort(shares)[-self.config.moe.experts_per_token :]
        out = np.zeros_like(x)
        for e in best:
            gate, up = np.einsum("d,dgf->gf", x, self.weights[f"{name}.experts.gate_up"][e])
            out += shares[e] / shares[best].sum() * ((act(gate) * up) @ self.weights[f"{name}.experts.down"][e])
        return out

    def _dense(self, name: str, x: np.ndarray) -> np.ndarray:
        return np.tensordot(x, self.weights[f"{name}.kernel"], axes=x.ndim) + self.weights.get(f"{name}.bias", 0.0)

    def _norm(self, name: str, x: np.ndarray) -> np.ndarray:
        """The named norm; x itself where the architecture has none there."""
        if f"{name}.scale" not in self.weights:
            return x
        if self.config.norm == "layer":
            x = x - x.mean(axis=-1, keepdims=True)
        scale = self.weights[f"{name}.scale"] + (1.0 if self.config.norm_unit_offset else 0.0)
        return _rms(x, self.config.norm_eps) * scale + self.weights.get(f"{name}.bias", 0.0)


def _rms(x: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + eps)


def _softmax(x: np.ndarray) -> np.ndarray:
    weights = np.exp(x - x.max())
    return weights / weights.sum()


def _softcap(x: np.ndarray, cap: float | None) -> np.ndarray:
    return x if cap is None else cap * np.tanh(x / cap)
