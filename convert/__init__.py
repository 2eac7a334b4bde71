"""Converts Hugging Face and GGUF checkpoints to `tide_jax` models and proves that the logits agree."""

TYPE_CHECKING = False  # as in tide_jax, a public name is imported at its first use
if TYPE_CHECKING:
    from convert.conversion import ConversionReport, convert, open_config, open_model
    from convert.exporting import ExportReport, export
    from convert.sources.open import open_tokenizer

_HOMES = {
    "ConversionReport": "conversion",
    "ExportReport": "exporting",
    "convert": "conversion",
    "export": "exporting",
    "open_config": "conversion",
    "open_model": "conversion",
    "open_tokenizer": "sources.open",
}

__all__ = ["ConversionReport", "ExportReport", "convert", "export", "open_config", "open_model", "open_tokenizer"]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    found = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
