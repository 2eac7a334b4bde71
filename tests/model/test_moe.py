"""Mixtures of experts against plain NumPy loops: which experts a token gets, with what weight, and what they give."""

from __future__ import annotations

import itertools
import math
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tide_jax.errors import TideError
from tide_jax.model.architecture import MoEConfig
from tide_jax.model.architecture_parts import Correction, GroupScore
from tide_jax.model.moe import MoE, _by_blocks, _by_row, _by_runs, choose_experts, expert_matmul
from tide_jax.testing import tiny_config

TOKENS, EXPERTS, CHOSEN = 64, 12, 3


def moe_config(**flags: Any) -> MoEConfig:
    fields: dict[str, Any] = {"num_experts": EXPERTS, "experts_per_token": CHOSEN, "intermediate_size": 7}
    return MoEConfig(**(fields | flags))


def random_logits(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 2, (TOKENS, EXPERTS)).astype(np.float32)


def random_correction() -> np.ndarray:
    return np.random.default_rng(1).normal(0, 0.5, EXPERTS).astype(np.float32)


def choice_of_one_token(moe: MoEConfig, logits: list[float], correction: list[float]) -> dict[int, float]:
    """Weight of each chosen expert, from the definitions, in Python numbers."""
    exponentials = [math.exp(x) for x in logits]
    softmax = [x / sum(exponentials) for x in exponentials]
    scores = softmax if moe.score == "softmax" else [1 / (1 + math.exp(-x)) for x in logits]
    base = logits if moe.correction == "logit" else scores
    rank = [a + b for a, b in zip(base, correction, strict=True)] if moe.correction != "none" else list(base)
    size = EXPERTS // moe.groups
    groups = [list(range(g * size, (g + 1) * size)) for g in range(moe.groups)]
    considered = 1 if moe.group_score == "max" else 2

    def worth(group: list[int]) -> float:
        return sum(sorted((rank[e] for e in group), reverse=True)[:considered])

    kept = sorted(groups, key=worth, reverse=True)[: moe.groups_kept]
    eligible = [e for group in kept for e in group]
    chosen = sorted(eligible, key=lambda e: rank[e], reverse=True)[: moe.experts_per_token]
    total = sum(scores[e] for e in chosen) if moe.renormalise else 1.0
    return {e: scores[e] / total * moe.scale for e in chosen}


def choices(moe: MoEConfig, logits: np.ndarray, correction: np.ndarray | None) -> list[dict[int, float]]:
    """Weight of each chosen expert, by `choose_experts`."""
    given = None if correction is None else jnp.asarray(correction)
    weights, chosen = choose_experts(moe, jnp.asarray(logits), given)
    assert weights.dtype == jnp.float32
    assert weights.shape == chosen.shape == (len(logits), moe.experts_per_token)
    pairs = zip(np.asarray(chosen).tolist(), np.asarray(weights).tolist(), strict=True)
    return [dict(zip(experts, weights, strict=True)) for experts, weights in pairs]


def assert_same(found: list[dict[int, float]], expected: list[dict[int, float]]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        np.testing.assert_allclose([one[e] for e in other], list(other.values()), rtol=2e-5)


GROUPS = [(1, 1), (4, 2), (6, 3), (3, 3)]


@pytest.mark.matrix(keep=4)
@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("correction", get_args(Correction))
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_choice_of_experts(score: Any, correction: Any, groups: tuple[int, int]) -> None:
    logits, bias = random_logits(), random_correction()
    for group_score, renormalise in itertools.product(get_args(GroupScore), (True, False)):
        moe = moe_config(
            score=score,
            correction=correction,
            groups=groups[0],
            groups_kept=groups[1],
            group_score=group_score,
            renormalise=renormalise,
            scale=1.7,
        )
        expected = [choice_of_one_token(moe, row, bias.tolist()) for row in logits.tolist()]
        assert_same(choices(moe, logits, None if correction == "none" else bias), expected)


def test_the_correction_changes_the_choice_and_nothing_else() -> None:
    moe = moe_config(score="sigmoid", correction="score", renormalise=False)
    plain, corrected = (choices(moe, random_logits(), bias) for bias in (None, random_correction()))
    assert any(a.keys() != b.keys() for a, b in zip(plain, corrected, strict=True))
    for a, b in zip(plain, corrected, strict=True):
        assert all(a[e] == b[e] for e in a.keys() & b.keys())


def test_every_flag_of_the_choice_matters() -> None:
    """Otherwise the comparison above could not tell one from the other."""
    base: dict[str, Any] = {"score": "sigmoid", "correction": "score", "groups": 4, "groups_kept": 2}
    found = choices(moe_config(**base), random_logits(), random_correction())
    changes = {
        "score": "softmax",
        "correction": "logit",
        "groups_kept": 3,
        "group_score": "max",
        "renormalise": False,
        "scale": 2.0,
    }
    for name, value in changes.items():
        assert choices(moe_config(**(base | {name: value})), random_logits(), random_correction()) != found, name


def sparsemixer_of_one_token(logits: list[float], count: int, threshold: float) -> dict[int, float]:
    weights: dict[int, float] = {}
    for _ in range(count):
        left = [e for e in range(len(logits)) if e not in weights]
        best = max(left, key=lambda e: logits[e])
        peak = logits[best]
        near = [e for e in left if (peak - logits[e]) / max(abs(logits[e]), peak) <= threshold]
        weights[best] = 1 / sum(math.exp(logits[e] - peak) for e in near)
    return weights


@pytest.mark.parametrize("count", [1, 2, 3])
def test_sparsemixer(count: int) -> None:
    moe = moe_config(score="sparsemixer", sparsemixer_threshold=0.6, experts_per_token=count)
    logits = random_logits()
    expected = [sparsemixer_of_one_token(row, count, 0.6) for row in logits.tolist()]
    assert_same(choices(moe, logits, None), expected)
    weights = np.array([list(row.values()) for row in expected])
    assert (weights == 1).any(), "only near ties"
    assert (weights < 1).any(), "no near ties"


FLAGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "biases": {"router_bias": True, "expert_bias": True},
    "softcap": {"router_softcap": 0.5},
    "weighted input": {"scale_input": True, "score": "sigmoid", "renormalise": False},
    "shared": {"shared_size": 9, "shared_scale": 0.5},
    "gated shared": {"shared_size": 9, "shared_gate": True},
    "normed": {"shared_size": 9, "output_norm": True},
}


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def mixture_of_one_token(moe: MoE, x: np.ndarray) -> np.ndarray:
    """One token through its experts, one after the other."""
    weight = {
        ".".join(map(str, path)): np.asarray(leaf[...], np.float64) for path, leaf in nnx.to_flat_state(nnx.state(moe))
    }
    logits = weight["router.kernel"] @ x + weight.get("router.bias", 0)
    if (cap := moe.moe.router_softcap) is not None:
        logits = cap * np.tanh(logits / cap)
    out = np.zeros_like(x)
    for expert, share in choice_of_one_token(moe.moe, logits.tolist(), []).items():
        entering, leaving = (share, 1) if moe.moe.scale_input else (1, share)
        hidden = np.einsum("d,dpf->pf", entering * x, weight["experts.gate_up"][expert])
        hidden = hidden + (weight["experts.gate_up_bias"][expert] if moe.moe.expert_bias else 0)
        down = silu(hidden[0]) * hidden[1] @ weight["experts.down"][expert]
        out += leaving * (down + (weight["experts.down_bias"][expert] if moe.moe.expert_bias else 0))
    if moe.moe.shared_size:
        hidden = np.einsum("d,pfd->pf", x, weight["shared.gate_up.kernel"])
        gate = 1 / (1 + np.exp(-weight["shared_gate.kernel"] @ x)) if moe.moe.shared_gate else 1
        out += moe.moe.shared_scale * gate * (weight["shared.down.kernel"] @ (silu(hidden[0]) * hidden[1]))
    if moe.moe.output_norm:
        out = out / np.sqrt(np.mean(out**2) + 1e-6) * weight["output_norm.scale"]
    return out


@pytest.mark.matrix
@pytest.mark.parametrize("tokens", [(3, 5), (2, 1)], ids=["many", "few"])
@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS)
def test_what_the_experts_give(flags: dict[str, Any], tokens: tuple[int, int]) -> None:
    config = tiny_config(moe=moe_config(**flags))
    moe = MoE(config, dtype=jnp.dtype(jnp.float32), rngs=nnx.Rngs(0))
    numbers = np.random.default_rng(2)

    def randomised(leaf: jax.Array) -> jax.Array:
        return jnp.asarray(numbers.normal(0, 0.5, leaf.shape), jnp.float32)

    nnx.update(moe, jax.tree.map(randomised, nnx.state(moe)))
    x = numbers.normal(size=(*tokens, config.hidden_size)).astype(np.float32)
    expected = [[mixture_of_one_token(moe, token.astype(np.float64)) for token in row] for row in x]
    np.testing.assert_allclose(np.asarray(moe(jnp.asarray(x))), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.matrix(keep=3)
@pytest.mark.parametrize("spread", ["random", "one for all", "uneven", "few"])
@pytest.mark.parametrize("way", [_by_blocks, _by_row, _by_runs, expert_matmul])
def test_products_by_expert(way: Any, spread: str) -> None:
    numbers = np.random.default_rng(3)
    expert = {
        "random": numbers.integers(0, EXPERTS, 50),
        "one for all": np.full(37, EXPERTS - 1),
        "uneven": np.repeat([0, 3, 4, 11], [1, 40, 2, 5]),
        "few": numbers.integers(0, EXPERTS, 5),
    }[spread]
    expert = np.sort(expert).astype(np.int32)
    rows = numbers.normal(size=(len(expert), 6)).astype(np.float32)
    kernels = numbers.normal(size=(EXPERTS, 6, 9)).astype(np.float32)
    found = way(jnp.asarray(rows), jnp.asarray(kernels), jnp.asarray(expert))
    expected = [row @ kernels[e] for row, e in zip(rows, expert, strict=True)]
    np.testing.assert_allclose(np.asarray(found), expected, rtol=1e-5, atol=1e-5)


def test_bfloat16_weights_choose_as_their_float32_values_do() -> None:
    """Router logits are not rounded: two experts a bfloat16's last bit apart stay apart."""
    config = tiny_config(moe=moe_config(num_experts=2, experts_per_token=1))
    moe = MoE(config, dtype=jnp.dtype(jnp.bfloat16), rngs=nnx.Rngs(0))
    kernel = np.zeros((2, config.hidden_size), np.float32)
    kernel[:, 0], kernel[:, 1] = 1.0, (0.0, 2.0**-9)  # logits 1 and 1 + 2^-9: equal in bfloat16
    moe.router.kernel[...] = jnp.asarray(kernel, jnp.bfloat16)
    moe.experts.down[...] = moe.experts.down[...].at[0].set(0.0)
    x = jnp.zeros((1, 1, config.hidden_size), jnp.bfloat16).at[..., :2].set(1.0)
    assert np.asarray(moe(x)).any()


@pytest.mark.matrix(keep=2)
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"experts_per_token": 0}, "experts_per_token=0 must lie between 1 and num_experts=12"),
        ({"experts_per_token": 13}, "experts_per_token=13 must lie between 1 and num_experts=12"),
        ({"groups": 5}, "12 experts cannot lie in groups=5"),
        ({"groups": 4, "groups_kept": 5}, "groups_kept=5"),
        ({"score": "tanh"}, "score='tanh' is not known"),
    ],
)
def test_impossible_mixtures(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(TideError, match=message):
        moe_config(**flags)
