"""Accelerators: what compilers make of the programs, and what they measure on one."""
