"""Runs from their settings to their results: the context that each needs, training, rounds, the look at data."""
