"""``python -m tide_jax.cli``: the command line without an installed script."""

from tide_jax.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
