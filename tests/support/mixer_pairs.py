"""A recurrent layer beside transformers' own, with the same random weights: what all such pairs need."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tide_jax.model.recurrent.mixer import Mixer

torch = pytest.importorskip("torch")
SIZE = 24
Pair = tuple[Mixer, Callable[[np.ndarray], np.ndarray]]
"""A layer, and what transformers' layer gives for rows without padding."""


def random_weights(module: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in module.parameters():
            weight.copy_(0.4 * torch.randn(weight.shape, generator=generator))


def set_weights(mixer: Mixer, **weights: Any) -> Mixer:
    """Sets parameters by dotted path; kernels as transformers stores them, outputs before inputs."""
    state = nnx.state(mixer)
    flat = {".".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(state)}
    given = {path.replace("__", "."): np.asarray(value.detach()) for path, value in weights.items()}
    assert set(flat) == set(given)
    for path, leaf in flat.items():
        leaf.set_value(jnp.asarray(given[path].reshape(leaf.get_value().shape)))
    nnx.update(mixer, state)
    return mixer


def reference(module: Any) -> Callable[[np.ndarray], np.ndarray]:
    def run(x: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return module(torch.tensor(x)).numpy()

    return run
