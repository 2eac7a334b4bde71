"""Readers of weights: directories, hub repositories, GGUF files, adapters."""
