"""Selects the rewards that score a prompt, and runs them on the host or in the graph."""
