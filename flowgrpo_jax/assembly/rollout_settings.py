"""These functions read from a config how images are drawn: window, branches, advantages."""

from __future__ import annotations

from typing import Any

from ml_collections import ConfigDict

from flowgrpo_jax import advantages
from flowgrpo_jax.advantages import Advantage
from flowgrpo_jax.algorithms import Algorithm
from flowgrpo_jax.sampling import windows
from flowgrpo_jax.sampling.branching import Branches

MOVED = "after the first optimiser step the policy is not the one that drew the images"
SHARED = "the forward passes that images share are not kept"
ZERO = "an advantage of 0 means that an image is not trained on, and the transform makes it -1"


def window(config: ConfigDict, algorithm: Algorithm) -> windows.Window:
    """Return the window: all steps but the last unless the config says fewer, and none for an
    algorithm that draws by the ODE alone."""
    s = config.sample
    if algorithm.records != "window":
        return windows.Window(0, 0, 0)
    return windows.find(s.steps, s.window, s.window_range)


def branches(config: ConfigDict) -> Branches:
    """Return which images of a group share a part of their path."""
    s = config.sample
    return Branches(s.branches or s.group_size, tuple(s.splits), s.split_noise)


def check_tape(config: ConfigDict, algorithm: Algorithm) -> None:
    """Raise ValueError where the forward passes of the rollout are not those of the update."""
    if not config.train.tape:
        return
    t, name = config.train, config.algorithm.name
    for knob, value, refused, reason in (
        ("algorithm.name", name, algorithm.records != "window", "it records no transitions"),
        ("algorithm.name", name, algorithm.draws != "policy", "another policy draws its images"),
        ("train.updates_per_epoch", t.updates_per_epoch, t.updates_per_epoch > 1, MOVED),
        ("train.step_each_term", True, t.step_each_term, MOVED),
        ("sample.branches", config.sample.branches, branches(config).leaves > 1, SHARED),
    ):
        if refused:
            raise ValueError(
                f"train.tape=True with {knob}={value!r}: {reason}; set train.tape to False"
            )


def make_advantage(config: ConfigDict, algorithm: Algorithm) -> Advantage:
    """Return the advantage; a section that a recipe has replaced may lack the newer knobs.

    Raises ValueError for what `advantages.load` refuses, and for a transform that would undo it.
    """
    _check_transform(config)
    c, size, steps = config.advantage, config.sample.group_size, window(config, algorithm).size
    paths: dict[str, Any] = {"branches": branches(config), "steps": steps}
    how = c.get("transform", "none")
    return advantages.load(
        c.name, c.options.to_dict(), group_size=size, clip=c.clip, transform=how, **paths
    )


def make_window(config: ConfigDict, algorithm: Algorithm) -> windows.Start:
    """Return the first step of an epoch's window, as a function of the run's key and the epoch."""
    s, chosen = config.sample, window(config, algorithm)
    if not chosen.size:
        return windows.frozen(chosen)
    return windows.load(s.window_schedule, s.window_options.to_dict(), chosen)


def _check_transform(config: ConfigDict) -> None:
    """Raise ValueError for -exp(-A) with what reads the zeros or the signs of advantages."""
    if config.advantage.get("transform", "none") != "exp":
        return
    name, algorithm = config.advantage.name, config.algorithm.name
    diversity = config.advantage.get("diversity", "")
    for knob, value, refused, reason in (
        ("advantage.name", name, name in ("tree", "best_of_n"), ZERO),
        ("algorithm.name", algorithm, algorithm in ("sft", "dpo"), ZERO),
        ("advantage.diversity", diversity, diversity, "it favours positive ones, and none is left"),
    ):
        if refused:
            raise ValueError(
                f"advantage.transform='exp' with {knob}={value!r}: {reason}; set"
                f" advantage.transform to 'none', or change {knob}"
            )
