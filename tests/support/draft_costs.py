"""Costs of passes and drafts, for tests of the lossless mode."""

from __future__ import annotations

import jax.numpy as jnp

from tide_jax.functional import PassCosts


def costs_of(*passes: float, twin: float | None = None, attention: float = 0.0) -> PassCosts:
    """Costs of passes over 1, 4 and 8 tokens, and of a twin's draft if there is a twin."""
    drafts = [0.0] if twin is None else [0.0, twin]
    return PassCosts(jnp.asarray(passes), jnp.asarray(drafts), jnp.float32(attention))


# A pass costs the same whatever the width: every draft is worth a try. Or none is. Or as on a CPU.
FREE, DEAR, CPU = costs_of(1.0, 1.0, 1.0), costs_of(1.0, 10.0, 100.0), costs_of(1.0, 1.4, 2.5)
# Drafts of a twin cost less than they bring.
TWIN = costs_of(1.0, 1.0, 1.0, twin=0.01)
