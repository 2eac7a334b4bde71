"""Drift: monitors the agreement of exits with the full model in production."""
