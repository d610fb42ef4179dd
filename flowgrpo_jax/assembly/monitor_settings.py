"""The check of a recipe's monitors, before anything is loaded."""

from __future__ import annotations

from ml_collections import ConfigDict

from flowgrpo_jax.assembly.settings import require
from flowgrpo_jax.monitors import true_loss


def check_monitors(config: ConfigDict) -> None:
    """Raise ValueError where an alarm of the monitors is to raise a KL that there cannot be, and
    for true pictures that cannot be watched what `true_loss.load` raises."""
    name, rank, weight = config.algorithm.name, config.lora.rank, config.monitor.kl_beta
    if config.monitor.on_alarm == "raise_kl":
        require(
            "kl_beta" in config.algorithm.options and rank > 0,
            f"monitor.on_alarm='raise_kl' needs an algorithm with a kl_beta and an adapter,"
            f" and the recipe has {name} with lora.rank={rank}: choose 'stop' or 'note'",
        )
        require(weight > 0, f"monitor.kl_beta={weight}: must be above 0, or nothing is raised")
    if config.monitor.pictures:
        true_loss.load(config.monitor.pictures, config.model.height, config.model.width)
