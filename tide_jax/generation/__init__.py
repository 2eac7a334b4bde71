"""Text generation: requests, sampling, compiled programs, results."""
