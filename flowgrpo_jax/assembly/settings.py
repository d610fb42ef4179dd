"""Checks of a config, before anything is loaded."""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from flowgrpo_jax import algorithms, rewards, seeds
from flowgrpo_jax.algorithms import Algorithm, Setup
from flowgrpo_jax.assembly.rollout_settings import branches, make_advantage, make_window, window
from flowgrpo_jax.models import attention, products
from flowgrpo_jax.prompts import tasks
from flowgrpo_jax.regularisation import kl_control
from flowgrpo_jax.sampling import sde, solvers
from flowgrpo_jax.sampling.sampler import Process
from flowgrpo_jax.storage import files


def require(condition: bool, message: str) -> None:
    """Raises ValueError with the message unless the condition holds."""
    if not condition:
        raise ValueError(message)


def choice(config: ConfigDict, section: str, key: str, options: Any) -> None:
    """Raises ValueError that names them unless the knob's value is one of the options."""
    value = config[section][key]
    names = ", ".join(map(repr, options))
    require(value in tuple(options), f"{section}.{key}={value!r}: choose from {names}")


def split_cpu(config: ConfigDict) -> None:
    """Let the CPU count as `config.cpu_devices` devices. To be called before JAX looks for any."""
    several = jax.distributed.is_initialized()  # processes: nothing is known of the others' cores
    devices = config.cpu_devices or (1 if several else _cores(config))
    if devices > 1 and "host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_num_cpu_devices", devices)


def _cores(config: ConfigDict) -> int:
    """Return the number of CPU devices: the size of the mesh if it is given in full.

    Else it is the number of cores, or fewer if they would not divide the micro-batches evenly.
    """
    given = [size for size in config.mesh.values() if size != -1]
    if len(given) == len(config.mesh):
        return math.prod(given)
    linux = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if linux else os.cpu_count() or 1
    s, updates = config.sample, max(config.train.updates_per_epoch, 1)
    together = math.gcd(
        s.micro_batch or s.groups * s.group_size // updates, config.eval.micro_batch
    )
    fixed = max(math.prod(given), 1)
    return max(n for n in range(1, cores + 1) if n == 1 or n % fixed == together % n == 0)


def check(config: ConfigDict) -> None:
    """Everything about the values that can be judged before anything is loaded."""
    choice(config, "sample", "density", sde.DENSITIES)
    choice(config, "sample", "reduction", sde.REDUCTIONS)
    choice(config, "reward", "host_call", ("overlap", "callback"))
    choice(config, "monitor", "on_alarm", ("note", "stop", "raise_kl"))
    require(
        config.model.dtype != "float16",
        "model.dtype='float16': gradients would underflow, for there is no loss scaling, and T5"
        " overflows; use 'bfloat16', or 'float32'",
    )
    choice(config, "model", "dtype", ("float32", "bfloat16"))
    choice(config, "model", "attention", attention.CHOICES)
    choice(config, "model", "product_dtype", products.CHOICES)
    require(
        config.model.product_dtype != "bfloat16" or config.model.dtype == "float32",
        f"model.product_dtype='bfloat16' with model.dtype={config.model.dtype!r}: it rounds what a"
        " model in float32 multiplies; set it to '', for the model computes in half precision",
    )
    require(
        not files.in_bucket(config.model.text_cache),
        f"model.text_cache={config.model.text_cache!r}: must be a directory on this machine or of a"
        " shared file system; copy the files from a bucket",
    )
    _check_numbers(config)
    _check_ranges(config)
    algorithm = algorithms.load(config.algorithm.name, config.algorithm.options.to_dict())
    resets = "reference" in algorithm.copies
    weights = config.reward.weights.to_dict()
    kl_control.check(weights, algorithm.weighs_kl, resets, **config.kl.to_dict())
    _check_sampling(config, algorithm)
    _check_advantage(config, algorithm)
    _check_terms(config, algorithm)
    _check_training(config)
    _check_evaluation(config)
    _check_rewards(config)
    _check_prompts(config)


LEAST = {  # setting: the least that it may be
    "cpu_devices": 0,
    "epochs": 0,
    "model.height": 1,
    "model.width": 1,
    "model.decode_batch": 0,
    "reward.threads": 1,
    "reward.timeout": 0,
    "train.learning_rate": 0,
    "train.warmup_steps": 0,
    "train.decay_steps": 0,
    "train.weight_decay": 0,
    "train.max_skipped": 0,
    "eval.every": 0,
    "eval.images": 1,
    "eval.micro_batch": 0,
    "eval.steps": 1,
    "eval.grid": 1,
    "checkpoint.every": 1,
    "checkpoint.keep": 0,
}
UNLIMITED = (  # may be inf
    "train.max_grad_norm",
    "advantage.clip",
    "algorithm.options.clip_range",
    "algorithm.options.threshold",
)
WHOLE = ("sample.window_range", "sample.strides", "sample.splits")  # whole numbers each
POSITIVE = ("train.max_grad_norm", "advantage.clip", "train.eps")
DECAYS = ("train.b1", "train.b2", "train.ema_decay")


def _check_numbers(config: ConfigDict) -> None:
    """Refuse NaN and infinity in every knob, reward option, weight and frequency."""
    for path, value in leaves("", config.to_dict()):
        whole = isinstance(value, int) and not isinstance(value, bool)
        require(path not in WHOLE or whole, f"{path}: {value!r} must be a whole number")
        if isinstance(value, float):
            limit = path in UNLIMITED and value == math.inf
            require(math.isfinite(value) or limit, f"{path}={value}: must be a finite number")
    for name, weight in config.reward.weights.items():
        number = isinstance(weight, float | int)
        require(number, f"reward.weights.{name}={weight!r}: must be a number")


def leaves(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Every value of a nested dict with its dotted path; items of a list have that of the list."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from leaves(f"{path}.{key}" if path else key, item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from leaves(path, item)
    else:
        yield path, value


def guidance(scale: float, knob: str, kind: str = "branch") -> float:
    """Return the guidance scale of sampling, for one of `models.GUIDANCES`.

    With a second branch a scale of at most 1 means none, and becomes 1: diffusers' pipelines do the
    same, and model cards of distilled models ask for 0. Raises ValueError that names the knob for a
    scale that is negative, not finite, or above 1 for a model without guidance.
    """
    require(
        math.isfinite(scale) and scale >= 0,
        f"{knob}={scale}: must be a finite number of at least 0; up to 1 means no guidance, above 1"
        " strengthens the prompt, and 4.5 is usual",
    )
    require(
        kind != "none" or scale <= 1,
        f"{knob}={scale}: this model has no guidance; set it to 1",
    )
    return scale if kind == "input" else max(scale, 1.0)


def _check_ranges(config: ConfigDict) -> None:
    for path in ("seed", "eval.seed"):
        seeds.check(path, operator.attrgetter(path)(config))
    for path, least in LEAST.items():
        value = operator.attrgetter(path)(config)
        require(value is not None and value >= least, f"{path}={value}: must be at least {least}")
    for path in POSITIVE:
        value = operator.attrgetter(path)(config)
        require(value > 0, f"{path}={value}: must be above 0")
    for path in DECAYS:
        value = operator.attrgetter(path)(config)
        require(0 <= value < 1, f"{path}={value}: must be in [0, 1)")
    failed = config.reward.max_failed
    require(0 <= failed <= 1, f"reward.max_failed={failed}: a share of images, must be in [0, 1]")


def _check_sampling(config: ConfigDict, algorithm: Algorithm) -> None:
    s, kernel = config.sample, sde.load(config.sample.kernel)
    guidance(s.guidance_scale, "sample.guidance_scale")
    guidance(config.eval.guidance_scale, "eval.guidance_scale")
    require(s.steps >= 2, f"sample.steps={s.steps}: a rollout that trains has at least 2 steps")
    for solver in (s.solver, config.eval.solver):
        solvers.load(solver)
    require(
        0 < s.tail <= 1,
        f"sample.tail={s.tail}: the share of the steps after the window, must be above 0 and at"
        " most 1; MixGRPO-Flash's is 0.4",
    )
    require(
        0 <= s.neighbor_noise < 1 and (s.branches == 1 or not s.neighbor_noise),
        f"sample.neighbor_noise={s.neighbor_noise}: an image's own share of the noise that its"
        " group shares, must be in [0, 1), and above 0 needs sample.branches=1",
    )
    if algorithm.records != "window":  # the ODE, which has no noise
        require(
            s.tail == 1,
            f"sample.tail={s.tail}: {config.algorithm.name} draws without a window, so that there"
            " are no steps after it; set 1, and sample.steps for fewer steps",
        )
        return
    require(
        s.noise_level > 0,
        f"sample.noise_level={s.noise_level}: without noise a rollout has no log-prob to train on;"
        f" {kernel.typical} is typical of {s.kernel}",
    )
    require(
        s.noise_level <= kernel.most_noise,
        f"sample.noise_level={s.noise_level}: {s.kernel} takes at most {kernel.most_noise:g}",
    )
    make_window(config, algorithm)


def _check_advantage(config: ConfigDict, algorithm: Algorithm) -> None:
    make_advantage(config, algorithm)
    for knob, none in (("diversity", ""), ("transform", "none")):
        value = config.advantage.get(knob, none)
        require(
            value == none or not algorithm.reward_gradient,
            f"advantage.{knob}={value!r}: {config.algorithm.name} differentiates the reward and"
            f" reads no advantage; set it to {none!r}",
        )


def _check_terms(config: ConfigDict, algorithm: Algorithm) -> None:
    """Let the algorithm say whether the rollout has what it trains on."""
    sigmas = tuple(np.linspace(1, 0, config.sample.steps + 1).tolist())
    size = window(config, algorithm).size
    solver = solvers.load(config.sample.solver)
    process = Process(sigmas, window=size, solver=solver, branches=branches(config))
    setup = Setup(process, config.sample.group_size)
    jax.eval_shape(lambda key: algorithm.terms(setup, key), jax.random.key(0))


def _check_training(config: ConfigDict) -> None:
    rank, alpha = config.lora.rank, config.lora.alpha
    require(
        rank >= 0, f"lora.rank={rank}: must be at least 1, or 0 to train all of the transformer"
    )
    require(
        not rank or alpha > 0,
        f"lora.alpha={alpha}: must be above 0, for the adapter is scaled by alpha / rank; the"
        f" paper's is twice the rank, {2 * rank}",
    )


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


def _check_prompts(config: ConfigDict) -> None:
    p, chosen = config.prompts, config.prompts.tasks.to_dict()
    require(
        not (chosen and (p.train or p.test)),
        "prompts.tasks takes the place of prompts.train and prompts.test: leave those empty",
    )
    weights = config.reward.weights.to_dict()
    tasks.check(chosen, weights, config.eval.rewards, alternate=p.alternate)
    shares = {f"prompts.tag_weights.{tag}": share for tag, share in p.tag_weights.items()}
    shares |= {f"prompts.tasks.{name}.weight": w for name, w in tasks.weights(chosen).items()}
    for path, share in shares.items():
        require(share >= 0, f"{path}={share}: a relative frequency, must be at least 0")
