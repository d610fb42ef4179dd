"""Reward functions: images in, scores out."""
