"""Checkpoints in GGUF, llama.cpp's file format."""
