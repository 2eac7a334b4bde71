"""Model types that are known and not converted, each with the reason."""

from __future__ import annotations

_RECURRENT = "has recurrent or linear-attention layers, whose state a skipped layer would leave behind"
REFUSED: dict[str, str] = {
    "mamba": _RECURRENT,
}
