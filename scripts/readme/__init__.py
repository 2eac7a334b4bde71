"""Makes the tables of the documents from scripts/results."""
