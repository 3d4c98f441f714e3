"""Stage 2 data: K completions of a prompt with their ranks."""
