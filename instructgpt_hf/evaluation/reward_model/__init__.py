"""Measures of a reward model on held-out rankings."""
