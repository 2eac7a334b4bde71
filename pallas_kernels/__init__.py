"""GPU kernels of tide_jax: one folder per operation, each with one entry point that takes `implementation=`."""
