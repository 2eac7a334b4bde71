"""Detects NaN and infinity in a model's outputs: computed on the device, raised as an error on the host.

Keys and values carry NaN and infinity to every later token that reads them, so checking the last token of a row covers
its whole prompt.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from tide_jax.errors import TideError

_OTHERS = "load the model with dtype='bfloat16' or 'float32'"
_DAMAGED = "its weights or its configuration are damaged, convert or download it again"


def finite_rows(x: Float[Array, "B ..."], counted: Bool[Array, "B T"] | None = None) -> Bool[Array, " B"]:
    """Rows without NaN or infinity; with `counted`, `x` is [B, T, D] and only counted tokens are checked."""
    finite = jnp.isfinite(x)
    if counted is not None:
        finite |= ~counted[:, :, None]
    return jnp.all(finite, axis=tuple(range(1, x.ndim)))


def check_finite(finite: Any, dtype: Any) -> None:
    """Raises TideError with advice unless all of `finite` is True; `dtype` is the model's."""
    if not np.all(finite):
        name = np.dtype(dtype).name
        advice = _OTHERS if name == "float16" else _DAMAGED
        raise TideError(f"the model's logits are not finite in {name}: {advice}")
