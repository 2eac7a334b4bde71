"""The GGUF architectures that can be read, by the name in `general.architecture`. One is one table entry."""

from __future__ import annotations

from convert.sources.gguf.architectures import dense, gemma, gpt, latent, mixtures
from convert.sources.gguf.architectures.base import Architecture

__all__ = ["ARCHITECTURES", "Architecture"]

ARCHITECTURES: dict[str, Architecture] = {
    **dense.ARCHITECTURES,
    **gemma.ARCHITECTURES,
    **gpt.ARCHITECTURES,
    **mixtures.ARCHITECTURES,
    **latent.ARCHITECTURES,
}
