"""Early exit, slowly: one token after the other, one layer after the other, in float64 NumPy.

Written from the definition and sharing no code with the library but the weights: no cache, no batch, no loop over
groups. Every step of a generation walks the whole row again.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np
from brute_force_recurrent import RecurrentLayer, with_previous

from tide_jax.exits.router import SCREEN_LEVELS, Routers
from tide_jax.model.architecture import AddScales, AttentionType, QKNorm
from tide_jax.model.decoder import Decoder, parameters
from tide_jax.model.recurrent.types import NothingType

_erf = np.vectorize(math.erf)
_ACTIVATIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "silu": lambda x: x / (1 + np.exp(-x)),
    "relu2": lambda x: np.maximum(x, 0) ** 2,
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
class Kept:
    """What a layer keeps of a token: key and value, inputs to its state, or both.

    Attributes:
      fed: the normed input of the feed-forward block, which RWKV's block reads of the token before.
    """

    key: np.ndarray | None = None
    value: np.ndarray | None = None
    inputs: np.ndarray | None = None
    fed: np.ndarray | None = None


@dataclasses.dataclass
class BruteForce:
    """A model, its routers and its dials; `exact`: tokens that have left run their other layers all the same, for their
    keys and values."""

    model: Decoder
    routers: Routers | None = None
    thresholds: float | Sequence[float] = 1.0
    min_layers: int = 0
    exact: bool = False

    def __post_init__(self) -> None:
        self.config = self.model.config
        self.weights = {path: np.asarray(a, np.float64) for path, a in parameters(self.model).items()}
        self.recurrent = {
            layer: RecurrentLayer(kind, _below(f"layers.{layer}.recurrent.", self.weights))
            for layer in range(self.config.num_layers)
            for kind in (self.config.layer_type(layer), self.config.recurrent_beside(layer))
            if kind is not None and not isinstance(kind, AttentionType | NothingType)
        }

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
        kept: list[list[Kept]] = [[] for _ in range(self.config.num_layers)]
        walked = Walked(np.zeros((len(row), self.config.vocab_size)), [], math.inf)
        for position, token in enumerate(row):
            x, state, left = self._embed(token, position), None, self.config.num_layers - 1
            carried = x if self.config.carried == "embedding" else 0.0
            for layer in range(self.config.num_layers):
                going_on = state is None or self.exact
                reads = x if going_on else self._translated(left, layer, x)
                kept[layer].append(self._kept(layer, reads, carried, position))
                if not going_on:
                    continue  # it has left: only its keys and values go on
                x, carried = self._layer(layer, x, carried, position, kept[layer])
                exit_points = self.routers.exit_points if self.routers is not None else ()
                allowed = position >= max(prompt_length, 1) and layer + 1 >= self.min_layers
                if state is not None or layer not in exit_points or not allowed:
                    continue
                c = exit_points.index(layer)
                threshold = self.thresholds if isinstance(self.thresholds, float) else self.thresholds[c]
                score, margin = self._score(c, x), math.inf
                if self.routers.confidence is not None:
                    screen = self._screen(c, threshold)
                    margin = abs(score - screen)
                    score = self._second_look(c, x, score) if score > screen else 0.0
                walked.margin = min(walked.margin, margin, abs(score - threshold))
                if score > threshold:
                    state, left = self._exit_state(c, x), layer
            walked.exit_layers.append(left)
            walked.logits[position] = self._logits(x if state is None else state)
        return walked

    def _score(self, c: int, x: np.ndarray) -> float:
        down, down_bias, up, up_bias = (np.asarray(a, np.float64) for a in self.routers.routers[c])
        hidden = _ACTIVATIONS["silu"](_rms(x, self.config.norm_eps) @ down + down_bias)
        return float(1 / (1 + np.exp(-(hidden @ up + up_bias))))

    def _screen(self, c: int, threshold: float) -> float:
        """That of the highest level up to the threshold, or of the lowest one."""
        levels = [level for level in SCREEN_LEVELS if level <= np.float32(threshold)] or SCREEN_LEVELS[:1]
        return 1.0 if threshold >= 1 else float(self.routers.confidence[c].screens[len(levels) - 1])

    def _second_look(self, c: int, x: np.ndarray, first: float) -> float:
        look = self.routers.confidence[c]
        logits = np.sort(self._logits(self._exit_state(c, x))[np.asarray(self.routers.candidates.ids)])
        total = np.log(np.sum(np.exp(logits - logits[-1]))) + logits[-1]
        found = np.asarray([np.log(first / (1 - first)), logits[-1] - total, logits[-1] - logits[-2], total])
        down, down_bias, up, up_bias = (np.asarray(a, np.float64) for a in look[1:])
        return float(1 / (1 + np.exp(-(_ACTIVATIONS["silu"](found @ down + down_bias) @ up + up_bias))))

    def _exit_state(self, c: int, x: np.ndarray) -> np.ndarray:
        if self.routers.heads is None:
            return x
        head = self.routers.heads[c]
        normed = mapped = _rms(x, self.config.norm_eps)
        for factor in head.factors:
            mapped = mapped @ np.asarray(factor, np.float64)
        return normed + mapped + np.asarray(head.bias, np.float64)

    def _translated(self, left: int, layer: int, x: np.ndarray) -> np.ndarray:
        """What the layer reads of a token that left after layer `left` with x."""
        if self.routers.translators is None or layer == left + 1:
            return x
        c, entry = self.routers.exit_points.index(left), self.routers.translators.layers[layer]
        size = math.sqrt(np.mean(x**2) + self.config.norm_eps)
        code = x / size @ np.asarray(self.routers.translators.down[c], np.float64)
        return x + size * (np.asarray(entry.shift[c], np.float64) + code @ np.asarray(entry.up[c], np.float64))

    def _embed(self, token: int, position: int) -> np.ndarray:
        x = self.weights["embed.kernel"][token] * (self.config.embedding_scale or 1.0)
        if self.config.embedding_size is not None:
            x = self._dense("project_in", x)
        index = position + self.config.position_offset
        if self.config.positions == "learned":
            x = x + self.weights["positions.kernel"][index]
        if self.config.positions == "sinusoidal":
            half = self.config.hidden_size // 2
            angles = index * 10000.0 ** (-np.arange(half) / (half - 1))
            x = x + np.concatenate([np.sin(angles), np.cos(angles)])
        return self._norm("embedding_norm", x)

    def _logits(self, x: np.ndarray) -> np.ndarray:
        kernel = self.weights["embed.kernel" if self.config.tie_embeddings else "head.kernel"]
        x = self._norm("final_norm", x)
        x = x if self.config.embedding_size is None else self._dense("project_out", x)
        logits = kernel @ x + self.weights.get("head.bias", 0.0)
        return _softcap(logits * self.config.logit_scale, self.config.logit_softcap)

    def _layer(
        self, layer: int, x: np.ndarray, carried: np.ndarray | float, position: int, kept: list[Kept]
    ) -> tuple[np.ndarray, np.ndarray | float]:
        """The residual stream after a layer, and what it carries."""
        name, config = f"layers.{layer}", self.config
        if self._guided(layer):
            x = self._add(f"{name}.none", x, self._guide(layer, x, carried, position, kept), config.add_scales(layer))
            return x, carried
        normed, middle = self._norm(f"{name}.pre_attention_norm", x), x
        residual = normed if config.normed_residual else x
        mixed = []
        if isinstance(config.layer_type(layer), AttentionType):
            mixed.append(self._attend(layer, normed, position, kept))
        if layer in self.recurrent:
            mixed.append(self.recurrent[layer].mix(normed, [token.inputs for token in kept]))
        if mixed:
            middle = self._add(f"{name}.post_attention_norm", residual, sum(mixed), config.add_scales(layer))
        if not config.has_mlp(layer):
            return middle, carried
        mlp_input = self._norm(f"{name}.pre_mlp_norm", x if config.parallel_residual else middle)
        if f"{name}.mlp.shares" in self.weights:
            kept[-1].fed = mlp_input  # of a token that has left, it stays what `_kept` projected
            fed = self._channel_mix(layer, kept)
        else:
            fed = self._feed_forward(layer, normed if config.shared_norm else mlp_input)
        residual = mlp_input if config.normed_residual else middle
        out = self._add(f"{name}.post_mlp_norm", residual, fed, config.mlp_add_scales)
        if config.carried != "shortcut":
            return out, carried
        return (
            (out, self._experts(f"{name}.shortcut", mlp_input)) if config.has_shortcut(layer) else (out + carried, 0.0)
        )

    def _guided(self, layer: int) -> bool:
        return f"layers.{layer}.guide.out.kernel" in self.weights

    def _guide(
        self, layer: int, x: np.ndarray, carried: np.ndarray | float, position: int, kept: list[Kept]
    ) -> np.ndarray:
        """The output of a recurrent layer whose input the output of attention and feed-forward block adds to."""
        name = f"layers.{layer}.guide"
        mixed = self._attend(layer, self._norm(f"{name}.norm", np.concatenate([x, carried])), position, kept)
        guidance = self._dense(f"{name}.out", self._mlp(f"{name}.mlp", self._norm(f"{name}.mlp_norm", mixed)))
        normed = self._norm(f"layers.{layer}.pre_attention_norm", x + guidance)
        kept[-1].inputs = self.recurrent[layer].inputs(normed)
        return self.recurrent[layer].mix(normed, [token.inputs for token in kept])

    def _attention(self, layer: int) -> str:
        return f"layers.{layer}.{'guide.' if self._guided(layer) else ''}attention"

    def _add(self, norm: str, x: np.ndarray, update: np.ndarray, scales: AddScales) -> np.ndarray:
        x = x * scales.stream
        if self.config.norm_placement == "residual":
            return self._norm(norm, x + scales.update * update)
        return x + scales.update * self._norm(norm, update)

    def _attend(self, layer: int, x: np.ndarray, position: int, kept: list[Kept]) -> np.ndarray:
        name, kind = self._attention(layer), self.config.layer_type(layer)
        keys, values = [token.key for token in kept], [token.value for token in kept]
        queries = self._queries(layer, x, position)
        seen = [p for p in range(position + 1) if _sees(kind, position, p)]
        group = len(queries) // len(keys[0])
        mixed = np.zeros((len(queries), values[0].shape[1]))
        for h, query in enumerate(queries):
            scores = np.array([kind.scale * (query @ keys[p][h // group]) for p in seen])
            scores = _softcap(scores, self.config.attention_softcap)
            if kind.alibi:
                scores = scores - kind.alibi[h] * (position - np.array(seen))
            sink = [self.weights[f"{name}.sinks"][h]] if kind.sinks else []
            shares = _softmax(np.array([*scores, *sink]))
            for p, share in zip(seen, shares, strict=False):
                mixed[h] += share * values[p][h // group]
        if self.config.latent is not None:
            mixed = np.einsum("hr,rhv->hv", mixed, self.weights[f"{name}.v_up.kernel"])
        if self.config.attention_gate != "none":
            mixed = mixed / (1 + np.exp(-self._dense(f"{name}.gate", x)))
        if self.config.sub_norm:
            mixed = self._norm(f"{name}.sub_norm", mixed.reshape(-1), flat=True).reshape(mixed.shape)
        return self._dense(f"{name}.out", mixed)

    def _queries(self, layer: int, x: np.ndarray, position: int) -> np.ndarray:
        name, kind, latent = self._attention(layer), self.config.layer_type(layer), self.config.latent
        if latent is None:
            queries = self._placed(layer, f"{name}.q_norm", self._dense(f"{name}.q", x), position)
            if (growth := kind.query_scaling) is not None:
                steps = math.floor((position + growth.offset) / growth.period)
                queries = queries * (1 + growth.beta * math.log(1 + steps))
            return queries
        if latent.q_rank is not None:
            down = self._dense(f"{name}.q_down", x)
            x = latent.q_scale * _rms(down, latent.norm_eps) * self.weights[f"{name}.q_norm.scale"]
        queries = self._dense(f"{name}.q", x)
        nope = np.einsum("hn,rhn->hr", queries[:, : latent.nope_dim], self.weights[f"{name}.k_up.kernel"])
        return np.concatenate([nope, self._rotate(layer, queries[:, latent.nope_dim :], position)], axis=1)

    def _kept(self, layer: int, x: np.ndarray, carried: np.ndarray | float, position: int) -> Kept:
        """What a layer keeps of a token that does not run it."""
        kept = Kept()
        if f"layers.{layer}.mlp.shares" in self.weights:
            kept.fed = self._norm(f"layers.{layer}.pre_mlp_norm", x)
        if isinstance(self.config.layer_type(layer), AttentionType):
            norm, read = f"layers.{layer}.pre_attention_norm", x
            if self._guided(layer):
                norm, read = f"layers.{layer}.guide.norm", np.concatenate([x, carried])
            kept.key, kept.value = self._key_value(layer, self._norm(norm, read), position)
        if layer in self.recurrent:
            kept.inputs = self.recurrent[layer].inputs(self._norm(f"layers.{layer}.pre_attention_norm", x))
        return kept

    def _key_value(self, layer: int, x: np.ndarray, position: int) -> tuple[np.ndarray, np.ndarray]:
        name, latent = self._attention(layer), self.config.latent
        if latent is None:
            both = self._dense(f"{name}.kv", x)
            return self._placed(layer, f"{name}.k_norm", both[:, 0], position), self._clip(
                both[:, 1]
            ) * self.config.value_scale
        down = self._dense(f"{name}.kv_down", x)
        vector = _rms(down[: latent.kv_rank], latent.norm_eps) * self.weights[f"{name}.kv_norm.scale"]
        vector = (latent.kv_scale * vector)[None]
        return np.concatenate([vector, self._rotate(layer, down[None, latent.kv_rank :], position)], axis=1), vector

    def _placed(self, layer: int, name: str, heads: np.ndarray, position: int) -> np.ndarray:
        """Queries or keys, normed and rotated in the architecture's order."""
        norm = self.config.layer_type(layer).qk_norm
        if norm is not None and not norm.after_rope:
            heads = self._qk_norm(name, heads, norm)
        heads = self._rotate(layer, self._clip(heads), position)
        return self._qk_norm(name, heads, norm) if norm is not None and norm.after_rope else heads

    def _clip(self, x: np.ndarray) -> np.ndarray:
        limit = self.config.clip_qkv
        return x if limit is None else x.clip(-limit, limit)

    def _qk_norm(self, name: str, heads: np.ndarray, norm: QKNorm) -> np.ndarray:
        axes = (0, 1) if norm.all_heads else 1
        if norm.kind == "layer":
            heads = heads - heads.mean(axis=axes, keepdims=True)
        heads = heads / np.sqrt(np.mean(heads**2, axis=axes, keepdims=True) + norm.eps)
        if norm.scale:
            heads = heads * (self.weights[f"{name}.scale"] + norm.unit_offset)
        return heads + self.weights.get(f"{name}.bias", 0.0)

    def _rotate(self, layer: int, heads: np.ndarray, position: int) -> np.ndarray:
        if (rope := self.config.layer_type(layer).rope) is None:
            return heads
        half = rope.rotary_dim // 2
        turn = np.exp((-1j if rope.reverse else 1j) * position / rope.theta ** (np.arange(half) / half))
        first, second = slice(0, half), slice(half, 2 * half)
        if rope.interleaved:
            first, second = slice(0, 2 * half, 2), slice(1, 2 * half, 2)
        turned = (heads[:, first] + 1j * heads[:, second]) * turn
        out = heads.copy()
        out[:, first], out[:, second] = turned.real, turned.imag
        return out

    def _feed_forward(self, layer: int, x: np.ndarray) -> np.ndarray:
        own = self.config.has_experts(layer) and not self.config.has_shortcut(layer)
        return self._experts(f"layers.{layer}.mlp", x) if own else self._mlp(f"layers.{layer}.mlp", x)

    def _experts(self, name: str, x: np.ndarray) -> np.ndarray:
        moe = self.config.moe
        assert moe is not None
        shares = _softmax(x @ self.weights[f"{name}.router.kernel"])
        best = np.argsort(shares)[-moe.experts_per_token :]
        act, out = _ACTIVATIONS[self.config.activation], np.zeros_like(x)
        for e in best:
            if e >= moe.num_experts:  # the token itself
                out += shares[e] / shares[best].sum() * x
                continue
            gate, up = np.einsum("d,dgf->gf", x, self.weights[f"{name}.experts.gate_up"][e])
            out += shares[e] / shares[best].sum() * ((act(gate) * up) @ self.weights[f"{name}.experts.down"][e])
        return moe.scale * out + (self._mlp(f"{name}.shared", x) if moe.shared_size else 0.0)

    def _channel_mix(self, layer: int, kept: list[Kept]) -> np.ndarray:
        """RWKV's feed-forward block: its gate and its input each mix a token with the one before it."""
        name, newest = f"layers.{layer}.mlp", kept[-1].fed
        before = kept[-2].fed if len(kept) > 1 else np.zeros_like(newest)
        x, gate = with_previous(newest, before, self.weights[f"{name}.shares"])
        return self._mlp(f"{name}.block", x) / (1 + np.exp(-self._dense(f"{name}.gate", gate)))

    def _mlp(self, name: str, x: np.ndarray) -> np.ndarray:
        act = _ACTIVATIONS[self.config.activation]
        if self.config.mlp_gated:
            gate, up = self._dense(f"{name}.gate_up", x)
            hidden = act(self.config.mlp_gate_scale * gate) * up
        else:
            hidden = act(self._dense(f"{name}.up", x))
        return self._dense(f"{name}.down", self._norm(f"{name}.sub_norm", hidden))

    def _dense(self, name: str, x: np.ndarray) -> np.ndarray:
        return np.tensordot(x, self.weights[f"{name}.kernel"], axes=x.ndim) + self.weights.get(f"{name}.bias", 0.0)

    def _norm(self, name: str, x: np.ndarray, flat: bool = False) -> np.ndarray:
        """The named norm; x itself where the architecture has none there."""
        if f"{name}.scale" not in self.weights:
            return x
        if self.config.norm == "layer":
            x = x - x.mean(axis=-1, keepdims=True)
        scale = self.weights[f"{name}.scale"] + (1.0 if self.config.norm_unit_offset else 0.0)
        scale = scale.reshape(-1) if flat else scale
        return _rms(x, self.config.norm_eps) * scale + self.weights.get(f"{name}.bias", 0.0)


def _below(prefix: str, weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {path.removeprefix(prefix): a for path, a in weights.items() if path.startswith(prefix)}


def _sees(kind: AttentionType, query: int, key: int) -> bool:
    near = kind.window is None or query - key < kind.window
    return near and (kind.chunk is None or query // kind.chunk == key // kind.chunk)


def _rms(x: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + eps)


def _softmax(x: np.ndarray) -> np.ndarray:
    weights = np.exp(x - x.max())
    return weights / weights.sum()


def _softcap(x: np.ndarray, cap: float | None) -> np.ndarray:
    return x if cap is None else cap * np.tanh(x / cap)
