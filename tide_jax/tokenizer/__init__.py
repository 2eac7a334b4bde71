"""Reads tokenizers and chat templates from the files of a checkpoint."""
