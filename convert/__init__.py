"""Conversion of Hugging Face and GGUF checkpoints to `tide_jax` models, with proof that the logits agree."""

from convert.conversion import ConversionReport, convert, open_config, open_model
from convert.exporting import ExportReport, export
from convert.reader import open_tokenizer

__all__ = ["ConversionReport", "ExportReport", "convert", "export", "open_config", "open_model", "open_tokenizer"]
