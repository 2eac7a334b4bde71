"""From prompts to new tokens: requests, sampling, compiled programs, results."""
