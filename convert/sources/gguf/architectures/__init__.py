"""The supported GGUF architectures by their name in `general.architecture`: one table entry each."""

from __future__ import annotations

from convert.sources.gguf.architectures import delta, dense, gemma, gpt, hybrids, latent, mixtures, recurrent
from convert.sources.gguf.architectures.base import Architecture

__all__ = ["ARCHITECTURES", "Architecture"]

ARCHITECTURES: dict[str, Architecture] = {
    **dense.ARCHITECTURES,
    **gemma.ARCHITECTURES,
    **gpt.ARCHITECTURES,
    **mixtures.ARCHITECTURES,
    **latent.ARCHITECTURES,
    **recurrent.ARCHITECTURES,
    **hybrids.ARCHITECTURES,
    **delta.ARCHITECTURES,
}
