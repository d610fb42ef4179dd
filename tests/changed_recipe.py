"""A recipe with some of its knobs changed."""

import importlib

from ml_collections import ConfigDict


def load(name, changes=None):
    """A recipe with some knobs changed: {"sample.steps": 4}."""
    config = importlib.import_module(f"flowgrpo_jax.configs.{name}").get_config()
    if not config.reward.weights:  # base.py leaves the choice to the recipes
        config.reward.weights = ConfigDict({"jpeg_compressibility": 1.0})
    config.update_from_flattened_dict(changes or {})
    return config
