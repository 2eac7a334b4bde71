"""Runs the engine as a model of lm-evaluation-harness."""
