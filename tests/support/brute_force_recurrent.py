"""Recurrent layers, slowly: each token runs its row's whole recurrence again, in float64 NumPy, one token at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from tide_jax.model.recurrent.types import (
    GatedDeltaType,
    RecurrentType,
    SelectiveType,
    ShortConvType,
    StateSpaceType,
)


@dataclasses.dataclass
class RecurrentLayer:
    """One layer's type, and its weights by their paths in the layer."""

    kind: RecurrentType
    weights: Mapping[str, np.ndarray]

    def inputs(self, x: np.ndarray) -> np.ndarray:
        """What a token gives to the state: channels of the convolution, then the rest."""
        match self.kind:
            case ShortConvType():
                first, _, last = self._dense("inputs", x)
                return first * last
            case GatedDeltaType():
                return np.concatenate([self._dense(part, x).reshape(-1) for part in ("q", "k", "v", "gates")])
            case StateSpaceType():
                keys = self.kind.groups * self.kind.state_size
                sizes = self.kind.heads * self.kind.head_dim, keys, keys, self.kind.heads
                both = np.concatenate([self._dense("stream", x), self._dense("step", x)])
                return both * np.repeat(self.kind.scales[1:], sizes)
            case SelectiveType():
                return self._dense("stream_gate", x)[0]
        raise NotImplementedError(self.kind)

    def mix(self, x: np.ndarray, inputs: list[np.ndarray]) -> np.ndarray:
        """The output for the newest token, from the inputs of all tokens of its row."""
        names = ("q_filters", "k_filters", "v_filters") if "q_filters" in self.weights else ("filters",)
        filters = np.concatenate([self.weights[name] for name in names])
        channels, width = filters.shape
        rows = [np.zeros(channels)] * (width - 1) + [row[:channels] for row in inputs]
        bias = self.weights.get("filter_bias", 0.0)
        mixed = [np.einsum("kc,ck->c", rows[t : t + width], filters) + bias for t in range(len(inputs))]
        match self.kind:
            case ShortConvType():
                return self._dense("out", self._dense("inputs", x)[1] * mixed[-1])
            case GatedDeltaType():
                return self._delta(x, inputs, [_silu(row) for row in mixed])
            case StateSpaceType():
                return self._state_space(x, inputs, [_silu(row) for row in mixed])
            case SelectiveType():
                return self._selective(x, [_silu(row) for row in mixed])
        raise NotImplementedError(self.kind)

    def _delta(self, x: np.ndarray, inputs: list[np.ndarray], mixed: list[np.ndarray]) -> np.ndarray:
        kind = self.kind
        assert isinstance(kind, GatedDeltaType)
        keys, heads = kind.key_heads * kind.key_dim, kind.value_heads
        state = np.zeros((heads, kind.key_dim, kind.value_dim))
        out = np.zeros((heads, kind.value_dim))
        for raw, row in zip(inputs, mixed, strict=True):
            rates, fades = raw[-2 * heads : -heads], raw[-heads:]
            for h in range(heads):
                g = h // (heads // kind.key_heads)
                q, k = (_unit(row[at + g * kind.key_dim :][: kind.key_dim]) for at in (0, keys))
                v = row[2 * keys + h * kind.value_dim :][: kind.value_dim]
                fade = np.exp(self.weights["fade"][h]) * np.log1p(np.exp(fades[h] + self.weights["fade_bias"][h]))
                state[h] *= np.exp(-fade)
                state[h] += np.outer(k, (v - k @ state[h]) / (1 + np.exp(-rates[h])))
                out[h] = q @ state[h] / np.sqrt(kind.key_dim)
        normed = out / np.sqrt(np.mean(out**2, axis=-1, keepdims=True) + kind.norm_eps) * self.weights["norm.scale"]
        return self._dense("out", (normed * _silu(self._dense("output_gate", x))).reshape(-1))

    def _state_space(self, x: np.ndarray, inputs: list[np.ndarray], mixed: list[np.ndarray]) -> np.ndarray:
        kind = self.kind
        assert isinstance(kind, StateSpaceType)
        inner, size = kind.heads * kind.head_dim, kind.state_size
        state, out = np.zeros((kind.heads, size, kind.head_dim)), np.zeros((kind.heads, kind.head_dim))
        for raw, row in zip(inputs, mixed, strict=True):
            for h in range(kind.heads):
                g = h // (kind.heads // kind.groups)
                key, query = (row[at + g * size :][:size] for at in (inner, inner + kind.groups * size))
                value = row[h * kind.head_dim :][: kind.head_dim]
                step = np.log1p(np.exp(raw[-kind.heads + h] + self.weights["step_bias"][h]))
                step = np.clip(step, *kind.step_limit)
                state[h] = np.exp(-np.exp(self.weights["fade"][h]) * step) * state[h] + step * np.outer(key, value)
                out[h] = query @ state[h] + self.weights["passed"][h] * value
        gate, out = _silu(kind.scales[0] * self._dense("gate", x)), out.reshape(-1)
        out = out * gate if kind.norm == "after_gate" else out
        if kind.norm != "none":
            groups = out.reshape(kind.groups, -1)
            groups = groups / np.sqrt(np.mean(groups**2, axis=-1, keepdims=True) + kind.norm_eps)
            out = (groups * self.weights["norm.scale"]).reshape(-1)
        out = out if kind.norm == "after_gate" else out * gate
        return kind.output_scale * self._dense("out", out)

    def _selective(self, x: np.ndarray, mixed: list[np.ndarray]) -> np.ndarray:
        kind = self.kind
        assert isinstance(kind, SelectiveType)
        assert kind.norms == "none"
        state, out = np.zeros((kind.inner, kind.state_size)), np.zeros(kind.inner)
        for row in mixed:
            parts = self._dense("parts", row)
            low, key, query = np.split(parts, [kind.step_rank, kind.step_rank + kind.state_size])
            step = np.log1p(np.exp(self._dense("step", low) + self.weights["step_bias"]))[:, None]
            state = np.exp(-np.exp(self.weights["fade"]) * step) * state + step * np.outer(row, key)
            out = state @ query + self.weights["passed"] * row
        return self._dense("out", out * _silu(self._dense("stream_gate", x)[1]))

    def _dense(self, name: str, x: np.ndarray) -> np.ndarray:
        kernel, bias = self.weights[f"{name}.kernel"], self.weights.get(f"{name}.bias", 0.0)
        return np.tensordot(x, kernel, axes=x.ndim) + bias


def _silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.sqrt(np.sum(x**2) + 1e-6)
