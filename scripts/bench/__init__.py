"""Benchmarks; each writes one JSON file of scripts/results."""
