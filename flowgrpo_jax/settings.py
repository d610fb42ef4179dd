"""What follows from a config before anything is loaded: is it sound, and how is the batch cut."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from flowgrpo_jax import grpo, rewards, sde
from flowgrpo_jax.prompts import tasks

AT_ONCE = 4 * 512 * 512  # px a device: SD3.5-medium's update takes 12 of 16 GB (docs/scaling.md)


@dataclass(frozen=True)
class Plan:
    """The batch arithmetic that follows from the config, whatever the number of devices."""

    groups: int
    group_size: int
    updates: int
    micro_batch: int

    @property
    def images(self) -> int:
        return self.groups * self.group_size

    @property
    def micro_batches(self) -> int:
        """Of one update."""
        return self.images // self.updates // self.micro_batch

    def __str__(self) -> str:
        return (
            f"{self.groups} groups x {self.group_size} images = {self.images} images an epoch,"
            f" {self.updates} updates of {self.micro_batches} micro-batches of {self.micro_batch}"
        )


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def choice(config: ConfigDict, section: str, key: str, options: Any) -> None:
    value = config[section][key]
    names = ", ".join(map(repr, options))
    require(value in tuple(options), f"{section}.{key}={value!r}: choose from {names}")


def make_plan(config: ConfigDict, devices: int) -> Plan:
    """Raises ValueError that names the value, the constraint and the fix."""
    s, updates = config.sample, config.train.updates_per_epoch
    require(
        s.group_size >= 2,
        f"sample.group_size={s.group_size}: advantages are relative to the group, so at least 2",
    )
    require(
        updates >= 1 and s.groups >= 1 and s.groups % updates == 0,
        f"sample.groups={s.groups} is not a multiple of train.updates_per_epoch={updates}: every"
        " update needs the same number of whole groups",
    )
    per_update = s.groups * s.group_size // updates
    pixels = config.model.height * config.model.width
    micro = s.micro_batch or derived_micro_batch(per_update, devices, pixels)
    require(
        micro > 0 and per_update % micro == 0,
        f"sample.micro_batch={micro} does not divide the {per_update} images of an update"
        f" ({s.groups} groups x {s.group_size} / {updates} updates): choose a divisor of"
        f" {per_update}",
    )
    require(
        micro % devices == 0,
        f"sample.micro_batch={micro} is not a multiple of the {devices} devices it is spread over:"
        f" choose a multiple of {devices} that divides {per_update}",
    )
    require(
        config.eval.micro_batch % devices == 0,
        f"eval.micro_batch={config.eval.micro_batch} is not a multiple of the {devices} devices it"
        f" is spread over: choose a multiple of {devices}, or 0",
    )
    return Plan(s.groups, s.group_size, updates, micro)


def derived_micro_batch(images: int, devices: int, pixels: int) -> int:
    """The most images at once that cut an update of `images` evenly and are `AT_ONCE` px or fewer a
    device, of `pixels` each."""
    most = max(AT_ONCE // pixels, 1) * devices
    sizes = range(devices, min(most, images) + 1, devices)
    return max((m for m in sizes if images % m == 0), default=devices)


def check(config: ConfigDict) -> None:
    """Everything about the values that can be judged before anything is loaded."""
    choice(config, "sample", "kernel", sde.KERNELS)
    choice(config, "sample", "density", sde.DENSITIES)
    choice(config, "sample", "reduction", sde.REDUCTIONS)
    choice(config, "train", "advantage_std", grpo.STD_MODES)
    choice(config, "train", "kl_weighting", sde.KL_WEIGHTINGS)
    choice(config, "train", "step_choice", ("random", "first"))
    choice(config, "reward", "host_call", ("overlap", "callback"))
    choice(config, "reward", "combine", grpo.COMBINATIONS)
    require(
        config.model.dtype != "float16",
        "model.dtype='float16': gradients would underflow, for there is no loss scaling, and T5"
        " overflows; use 'bfloat16', or 'float32'",
    )
    choice(config, "model", "dtype", ("float32", "bfloat16"))
    _check_ranges(config)
    _check_sampling(config)
    _check_training(config)
    _check_evaluation(config)
    _check_rewards(config)


LEAST = {  # setting: the least that it may be
    "seed": 0,
    "epochs": 0,
    "model.height": 1,
    "model.width": 1,
    "reward.threads": 1,
    "reward.timeout": 0,
    "train.learning_rate": 0,
    "train.warmup_steps": 0,
    "train.decay_steps": 0,
    "train.weight_decay": 0,
    "train.max_skipped": 0,
    "train.kl_beta": 0,
    "eval.every": 0,
    "eval.images": 1,
    "eval.micro_batch": 0,
    "eval.steps": 1,
    "eval.seed": 0,
    "eval.grid": 1,
    "checkpoint.every": 1,
    "checkpoint.keep": 1,
}
POSITIVE = ("train.clip_range", "train.max_grad_norm", "train.advantage_clip")


def _check_ranges(config: ConfigDict) -> None:
    for path, least in LEAST.items():
        value = operator.attrgetter(path)(config)
        if value is None and path == "checkpoint.keep":  # all of them
            continue
        require(value is not None and value >= least, f"{path}={value}: must be at least {least}")
    for path in POSITIVE:
        value = operator.attrgetter(path)(config)
        require(value > 0, f"{path}={value}: must be above 0")


def _check_sampling(config: ConfigDict) -> None:
    s = config.sample
    require(
        s.noise_level > 0,
        f"sample.noise_level={s.noise_level}: without noise a rollout has no log-prob to train on;"
        " typical are 0.7 (flow_sde) and 0.8 (cps)",
    )
    require(
        s.kernel != "cps" or s.noise_level <= 1,
        f"sample.noise_level={s.noise_level}: cps takes a share of the noise, at most 1",
    )
    require(s.steps >= 2, f"sample.steps={s.steps}: a rollout that trains has at least 2 steps")
    low, high = window_range(config)
    size = window(config)
    require(
        low >= 0 and high <= s.steps - 1 and 1 <= size <= high - low,
        f"sample.window={size} in sample.window_range={(low, high)} does not fit into the first"
        f" {s.steps - 1} of {s.steps} steps (the last one has almost no noise)",
    )


def _check_training(config: ConfigDict) -> None:
    t, size, rank = config.train, window(config), config.lora.rank
    require(0 <= t.steps <= size, f"train.steps={t.steps}: the window has {size} steps to train")
    require(
        rank >= 0, f"lora.rank={rank}: must be at least 1, or 0 to train all of the transformer"
    )
    require(0 <= t.ema_decay < 1, f"train.ema_decay={t.ema_decay}: must be in [0, 1)")


def _check_evaluation(config: ConfigDict) -> None:
    best, evaluated = config.checkpoint.best, config.eval.rewards or tuple(config.reward.weights)
    require(
        not best or best in evaluated,
        f"checkpoint.best={best!r} is not evaluated: choose from {', '.join(evaluated)}, or leave"
        " it empty to keep only the newest checkpoints",
    )


def _check_rewards(config: ConfigDict) -> None:
    require(
        any(config.reward.weights.values()),
        f"reward.weights={config.reward.weights.to_dict()}: name at least one reward whose weight"
        " is not 0",
    )
    for name in {*config.reward.weights, *config.eval.rewards, *config.reward.options}:
        rewards.row_of(name)
    require(
        not (config.prompts.tasks and (config.prompts.train or config.prompts.test)),
        "prompts.tasks takes the place of prompts.train and prompts.test: leave those empty",
    )
    tasks.check(
        config.prompts.tasks.to_dict(), config.reward.weights.to_dict(), config.eval.rewards
    )


def window(config: ConfigDict) -> int:
    return config.sample.window or config.sample.steps - 1


def window_range(config: ConfigDict) -> tuple[int, int]:
    """Where the window may lie; (0, window) is a fixed one."""
    low, high = config.sample.window_range
    return (low, high) if (low, high) != (0, 0) else (0, window(config))


def trained_steps(config: ConfigDict, key: jax.Array, epoch: int) -> jax.Array:
    """Which of the window's steps this epoch trains: i32 [K], in order."""
    size, k = window(config), config.train.steps or window(config)
    if k == size or config.train.step_choice == "first":
        return jnp.arange(k)
    key = jax.random.fold_in(jax.random.fold_in(key, epoch), 2**31 - 2)
    return jnp.sort(jax.random.permutation(key, size)[:k])
