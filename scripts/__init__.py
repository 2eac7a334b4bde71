"""What is run from the repository's root: ``python -m scripts.bench.decode``."""
