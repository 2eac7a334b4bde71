"""How far exits drift from the full model while they serve."""
