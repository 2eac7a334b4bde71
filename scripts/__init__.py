"""Scripts to run from the repository's root: ``python -m scripts.bench.decode``."""
