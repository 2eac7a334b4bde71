"""Accelerators: checks of compiled programs, and measurements on a GPU."""
