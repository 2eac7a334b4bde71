"""Checks config.json and reads it with every default resolved."""
