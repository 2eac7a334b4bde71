"""Per-token exits: who decides that a token leaves, and what layers then run."""
