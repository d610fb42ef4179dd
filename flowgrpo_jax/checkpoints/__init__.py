"""Checkpoints of a run, and the reading of saved policies."""
