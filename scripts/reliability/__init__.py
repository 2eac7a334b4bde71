"""Damaged files and killed runs, by the thousand."""
