"""Models that are in no table: what they compute is found out from their numbers."""
