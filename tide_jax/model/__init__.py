"""The decoder: what every family's configuration describes. It knows nothing of exits."""
