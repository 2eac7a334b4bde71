"""Guarantees: exit settings whose risk is bounded with a stated confidence."""
