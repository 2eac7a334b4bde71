"""Writing a converted directory, complete or not at all."""
