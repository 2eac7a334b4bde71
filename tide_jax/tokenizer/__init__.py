"""Tokenizers and chat templates, read from the files beside a checkpoint."""
