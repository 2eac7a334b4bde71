"""Reads converted directories and safetensors files into a decoder."""
