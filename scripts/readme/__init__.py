"""Tables of the documents, made from scripts/results."""
