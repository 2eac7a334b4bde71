"""Recurrent layers, slowly: each token runs its row's whole recurrence again, in float64 NumPy, one token at a time."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import numpy as np

from tide_jax.model.recurrent.types import (
    GatedDeltaType,
    KimiDeltaType,
    LightningType,
    MatrixLSTMType,
    RecurrentType,
    RgLruType,
    SelectiveType,
    ShortConvType,
    StateSpaceType,
    TimeMixType,
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
            case LightningType():
                return _silu(self._dense("qkv", x)).reshape(-1)
            case KimiDeltaType():
                low = self._dense("fades_down", x) if self.kind.fade_rank else x
                parts = [self._dense(part, x).reshape(-1) for part in ("q", "k", "v", "rate")]
                return np.concatenate([*parts, self._dense("fades", low).reshape(-1)])
            case RgLruType():
                return self._dense("stream", x)
            case MatrixLSTMType():
                return np.concatenate([self._dense(part, x).reshape(-1) for part in ("q", "k", "v", "gates")])
            case TimeMixType():
                return x
        raise NotImplementedError(self.kind)

    def mix(self, x: np.ndarray, inputs: list[np.ndarray]) -> np.ndarray:
        """The output for the newest token, from the inputs of all tokens of its row."""
        match self.kind:
            case LightningType():
                return self._lightning(x, inputs)
            case MatrixLSTMType():
                return self._lstm(x, inputs)
            case TimeMixType():
                return self._time_mix(inputs)
        mixed = self._convolved(inputs)
        match self.kind:
            case ShortConvType():
                return self._dense("out", self._dense("inputs", x)[1] * mixed[-1])
            case GatedDeltaType():
                return self._delta(x, inputs, [_silu(row) for row in mixed])
            case KimiDeltaType():
                return self._kimi_delta(x, inputs, [_silu(row) for row in mixed])
            case StateSpaceType():
                return self._state_space(x, inputs, [_silu(row) for row in mixed])
            case SelectiveType():
                return self._selective(x, [_silu(row) for row in mixed])
            case RgLruType():
                return self._rg_lru(x, mixed)
        raise NotImplementedError(self.kind)

    def _convolved(self, inputs: list[np.ndarray]) -> list[np.ndarray]:
        names = ("q_filters", "k_filters", "v_filters") if "q_filters" in self.weights else ("filters",)
        filters = np.concatenate([self.weights[name] for name in names])
        channels, width = filters.shape
        rows = [np.zeros(channels)] * (width - 1) + [row[:channels] for row in inputs]
        bias = self.weights.get("filter_bias", 0.0)
        return [np.einsum("kc,ck->c", rows[t : t + width], filters) + bias for t in range(len(inputs))]

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
        heads = kind.heads or 1
        size = kind.inner // heads
        read, project = (
            self.weights.get(f"{name}.kernel", self.weights.get(f"{name}.by_head")).reshape(heads, -1, width)
            for name, width in (("parts", kind.step_rank + 2 * kind.state_size), ("step", size))
        )
        for row in mixed:
            for h in range(heads):
                own = slice(h * size, (h + 1) * size)
                low, key, query = np.split(row[own] @ read[h], [kind.step_rank, kind.step_rank + kind.state_size])
                step = np.log1p(np.exp(low @ project[h] + self.weights["step_bias"][own]))[:, None]
                fade = np.exp(-np.exp(self.weights["fade"][own]) * step)
                state[own] = fade * state[own] + step * np.outer(row[own], key)
                out[own] = state[own] @ query + self.weights["passed"][own] * row[own]
        return self._dense("out", out * _silu(self._dense("stream_gate", x)[1]))

    def _kimi_delta(self, x: np.ndarray, inputs: list[np.ndarray], mixed: list[np.ndarray]) -> np.ndarray:
        kind = self.kind
        assert isinstance(kind, KimiDeltaType)
        assert kind.fade_limit is None
        inner, size = kind.heads * kind.head_dim, kind.head_dim
        state, out = np.zeros((kind.heads, size, size)), np.zeros((kind.heads, size))
        for raw, row in zip(inputs, mixed, strict=True):
            rates, fades = raw[3 * inner : -inner], raw[-inner:].reshape(kind.heads, size)
            for h in range(kind.heads):
                q, k, v = (row[part * inner + h * size :][:size] for part in range(3))
                q, k = _unit(q), _unit(k)
                fade = np.exp(self.weights["fade"][h]) * np.log1p(np.exp(fades[h] + self.weights["fade_bias"][h]))
                state[h] *= np.exp(-fade)[:, None]  # each key channel by itself
                state[h] += np.outer(k, (v - k @ state[h]) * _sigmoid(rates[h]))
                out[h] = q @ state[h] / np.sqrt(size)
        low = self._dense("gate_down", x) if kind.gate_rank else x
        normed = out / np.sqrt(np.mean(out**2, axis=-1, keepdims=True) + kind.norm_eps) * self.weights["norm.scale"]
        return self._dense("out", (normed * _sigmoid(self._dense("output_gate", low))).reshape(-1))

    def _lightning(self, x: np.ndarray, inputs: list[np.ndarray]) -> np.ndarray:
        kind = self.kind
        assert isinstance(kind, LightningType)
        state, out = np.zeros((kind.heads, kind.head_dim, kind.head_dim)), np.zeros((kind.heads, kind.head_dim))
        for row in inputs:
            for h, (q, k, v) in enumerate(row.reshape(kind.heads, 3, kind.head_dim)):
                state[h] = np.exp(-kind.fade * 2 ** (-8 * (h + 1) / kind.heads)) * state[h] + np.outer(k, v)
                out[h] = q @ state[h]
        normed = out / np.sqrt(np.mean(out**2) + kind.norm_eps) * self.weights["norm.scale"]
        return self._dense("out", normed * _sigmoid(self._dense("output_gate", x)))

    def _rg_lru(self, x: np.ndarray, mixed: list[np.ndarray]) -> np.ndarray:
        kind = self.kind
        assert isinstance(kind, RgLruType)
        assert kind.activation == "gelu_pytorch_tanh"
        state = np.zeros(kind.blocks * kind.block_dim)
        for t, row in enumerate(mixed):
            gates = np.einsum("nd,gnde->gne", row.reshape(kind.blocks, -1), self.weights["gates"])
            write, fade = _sigmoid(gates + self.weights["gate_bias"]).reshape(2, -1)
            factor = np.exp(-8 * np.log1p(np.exp(self.weights["fade"])) * fade)
            state = factor * state + (np.sqrt(1 - factor**2) if t else 1.0) * write * row
        gate = self._dense("output_gate", x)
        gate = 0.5 * gate * (1 + np.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)))
        return self._dense("out", state * gate)

    def _lstm(self, x: np.ndarray, inputs: list[np.ndarray]) -> np.ndarray:
        """Without the division by the largest exponent, but for `eps`, which is added after it."""
        kind = self.kind
        assert isinstance(kind, MatrixLSTMType)
        keys, values = kind.heads * kind.key_dim, kind.heads * kind.value_dim
        state, sums = np.zeros((kind.heads, kind.key_dim, kind.value_dim)), np.zeros((kind.heads, kind.key_dim))
        largest, out = np.zeros(kind.heads), np.zeros((kind.heads, kind.value_dim))
        for row in inputs:
            q, k, v, gates = np.split(row, [keys, 2 * keys, 2 * keys + values])
            q, k, v = (a.reshape(kind.heads, -1) for a in (q, k, v))
            write, keep = (kind.gate_softcap * np.tanh(gates / kind.gate_softcap)).reshape(2, kind.heads)
            for h in range(kind.heads):
                state[h] = _sigmoid(keep[h]) * state[h] + np.exp(write[h]) * np.outer(k[h], v[h])
                sums[h] = _sigmoid(keep[h]) * sums[h] + np.exp(write[h]) * k[h]
                largest[h] = max(largest[h] + np.log(_sigmoid(keep[h])), write[h])
                query = q[h] / np.sqrt(kind.key_dim)
                out[h] = query @ state[h] / (max(abs(query @ sums[h]), 1.0) + kind.eps * np.exp(largest[h]))
        out = out - out.mean(axis=-1, keepdims=True)
        normed = out / np.sqrt(np.mean(out**2, axis=-1, keepdims=True) + kind.norm_eps) * self.weights["norm.scale"]
        return self._dense("out", _sigmoid(self._dense("output_gate", x)) * normed)

    def _time_mix(self, inputs: list[np.ndarray]) -> np.ndarray:
        """The weighted mean of all values: of the newest with a bonus, of the others after they faded."""
        rows = [np.zeros_like(inputs[0]), *inputs]
        mixed = [with_previous(new, old, self.weights["shares"]) for old, new in zip(rows, inputs, strict=False)]
        keys, values = ([self._dense(name, row[i]) for row in mixed] for i, name in enumerate("kv"))
        fade, last = np.exp(self.weights["fade"]), len(inputs) - 1
        exponents = [key - (last - 1 - t) * fade for t, key in enumerate(keys[:-1])]
        weights = np.exp([*exponents, keys[-1] + self.weights["bonus"]])
        mean = np.sum(weights * values, axis=0) / np.sum(weights, axis=0)
        return self._dense("out", _sigmoid(self._dense("gate", mixed[-1][2])) * mean)

    def _dense(self, name: str, x: np.ndarray) -> np.ndarray:
        kernel, bias = self.weights[f"{name}.kernel"], self.weights.get(f"{name}.bias", 0.0)
        return np.tensordot(x, kernel, axes=x.ndim) + bias


def with_previous(x: np.ndarray, before: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """For each of several shares, that share of a token and the rest of the token before it."""
    return x * shares + before * (1 - shares)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def _silu(x: np.ndarray) -> np.ndarray:
    return x * _sigmoid(x)


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.sqrt(np.sum(x**2) + 1e-6)
