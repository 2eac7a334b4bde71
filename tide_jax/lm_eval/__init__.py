"""The engine as a model of lm-evaluation-harness."""
