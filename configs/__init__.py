"""Recipes, each found by its name: `--config geneval`. One of your own starts from one of them."""
