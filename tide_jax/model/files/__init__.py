"""Converted directories and safetensors files, read into a decoder."""
