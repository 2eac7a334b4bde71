"""GPU kernels of tide_jax, one folder per operation, each behind one entry point with `implementation=`."""
