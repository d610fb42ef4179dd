"""From a config to the parts that an entry point runs: checked, derived, built.

The only file below the entry points that sees a config; everything it calls takes plain arguments.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from flowgrpo_jax import grpo, programs, prompts, rewards, sde, sharding, update
from flowgrpo_jax.models import sd3, text_cache
from flowgrpo_jax.models.lora import LoRASpec
from flowgrpo_jax.prompts import tasks
from flowgrpo_jax.rewards import graph, host
from flowgrpo_jax.rewards.mix import Mix
from flowgrpo_jax.sampler import Process
from flowgrpo_jax.types import (
    Conditioning,
    GraphReward,
    Metadata,
    Params,
    Reward,
    Scores,
    Trajectory,
)


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


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _choice(config: ConfigDict, section: str, key: str, options: Any) -> None:
    value = config[section][key]
    names = ", ".join(map(repr, options))
    _require(value in tuple(options), f"{section}.{key}={value!r}: choose from {names}")


def make_plan(config: ConfigDict, devices: int) -> Plan:
    """Raises ValueError that names the value, the constraint and the fix."""
    s, updates = config.sample, config.train.updates_per_epoch
    _require(
        s.group_size >= 2,
        f"sample.group_size={s.group_size}: advantages are relative to the group, so at least 2",
    )
    _require(
        updates >= 1 and s.groups >= 1 and s.groups % updates == 0,
        f"sample.groups={s.groups} is not a multiple of train.updates_per_epoch={updates}: every"
        " update needs the same number of whole groups",
    )
    per_update = s.groups * s.group_size // updates
    micro = s.micro_batch or per_update
    _require(
        micro > 0 and per_update % micro == 0,
        f"sample.micro_batch={micro} does not divide the {per_update} images of an update"
        f" ({s.groups} groups x {s.group_size} / {updates} updates): choose a divisor of"
        f" {per_update}",
    )
    _require(
        micro % devices == 0,
        f"sample.micro_batch={micro} is not a multiple of the {devices} devices it is spread over:"
        f" choose a multiple of {devices} that divides {per_update}",
    )
    _require(
        config.eval.micro_batch % devices == 0,
        f"eval.micro_batch={config.eval.micro_batch} is not a multiple of the {devices} devices it"
        f" is spread over: choose a multiple of {devices}, or 0",
    )
    return Plan(s.groups, s.group_size, updates, micro)


def check(config: ConfigDict) -> None:
    """Everything about the values that can be judged before anything is loaded."""
    s, t = config.sample, config.train
    _choice(config, "sample", "kernel", sde.KERNELS)
    _choice(config, "sample", "density", sde.DENSITIES)
    _choice(config, "sample", "reduction", sde.REDUCTIONS)
    _choice(config, "train", "advantage_std", grpo.STD_MODES)
    _choice(config, "train", "kl_weighting", sde.KL_WEIGHTINGS)
    _choice(config, "train", "step_choice", ("random", "first"))
    _choice(config, "reward", "host_call", ("overlap", "callback"))
    _choice(config, "reward", "combine", grpo.COMBINATIONS)
    _choice(config, "model", "dtype", ("float32", "bfloat16", "float16"))
    _require(
        s.noise_level > 0,
        f"sample.noise_level={s.noise_level}: without noise a rollout has no log-prob to train on;"
        " typical are 0.7 (flow_sde) and 0.8 (cps)",
    )
    _require(
        s.kernel != "cps" or s.noise_level <= 1,
        f"sample.noise_level={s.noise_level}: cps takes a share of the noise, at most 1",
    )
    _require(s.steps >= 2, f"sample.steps={s.steps}: a rollout that trains has at least 2 steps")
    low, high = window_range(config)
    size = window(config)
    _require(
        low >= 0 and high <= s.steps - 1 and 1 <= size <= high - low,
        f"sample.window={size} in sample.window_range={(low, high)} does not fit into the first"
        f" {s.steps - 1} of {s.steps} steps (the last one has almost no noise)",
    )
    _require(0 <= t.steps <= size, f"train.steps={t.steps}: the window has {size} steps to train")
    _require(config.lora.rank >= 1, f"lora.rank={config.lora.rank}: must be at least 1")
    every = config.checkpoint.every
    _require(every >= 1, f"checkpoint.every={every}: must be at least 1 epoch")
    _require(t.clip_range > 0, f"train.clip_range={t.clip_range}: must be above 0")
    _require(0 <= t.ema_decay < 1, f"train.ema_decay={t.ema_decay}: must be in [0, 1)")
    _require(
        any(config.reward.weights.values()),
        f"reward.weights={config.reward.weights.to_dict()}: name at least one reward whose weight"
        " is not 0",
    )
    used = {*config.reward.weights, *config.eval.rewards}
    idle = sorted(set(config.reward.options) - used)
    _require(not idle, f"reward.options names {idle}: no such reward is used here, remove them")
    _require(
        not (config.prompts.tasks and (config.prompts.train or config.prompts.test)),
        "prompts.tasks takes the place of prompts.train and prompts.test: leave those empty",
    )
    tasks.check(config.prompts.tasks.to_dict(), used)


def window(config: ConfigDict) -> int:
    return config.sample.window or config.sample.steps - 1


def window_range(config: ConfigDict) -> tuple[int, int]:
    """Where the window may lie; (0, window) is a fixed one."""
    low, high = config.sample.window_range
    return (low, high) if (low, high) != (0, 0) else (0, window(config))


# ------------------------------------------------------------------------------- what is built


@dataclass(frozen=True)
class Programs:
    """The jitted programs of a run. Their first arguments are (lora, frozen weights)."""

    sample: Callable[..., tuple[Trajectory, jax.Array, Scores]]
    accumulate: Callable[..., Any]
    apply: Callable[..., Any]
    generate: Callable[..., jax.Array]


@dataclass(frozen=True)
class Scorer:
    """The rewards of a prompt source: those on the host, those in the graph, and their weights."""

    mix: Mix
    host: host.Score
    in_graph: dict[str, GraphReward]
    graph: graph.Score


@dataclass(frozen=True)
class Recipe:
    config: ConfigDict
    model: sd3.SD3
    mesh: Mesh
    plan: Plan
    process: Process
    optimiser: Any
    programs: Programs
    train_prompts: list[Metadata]
    test_prompts: list[Metadata]
    scorer: Scorer
    test_scorer: Scorer

    @property
    def weights(self) -> dict[str, Params]:
        """Frozen weights that sampling takes."""
        return {"transformer": self.model.base, "vae": self.model.params["vae"]}

    def encode(self, texts: list[str]) -> Conditioning:
        model, config = self.model, self.config.model
        if not config.text_cache:
            return sharding.replicate(self.mesh, model.encode(texts))
        settings = {"dtype": config.dtype, "t5": config.t5, "t5_length": config.t5_length}
        mark = text_cache.fingerprint(model.directory, **settings)
        cond = text_cache.encode_cached(model.encode, texts, config.text_cache, mark)
        return sharding.replicate(self.mesh, cond)


def load_model(config: ConfigDict, mesh: Mesh, lora_spec: LoRASpec | None = None) -> sd3.SD3:
    spec = lora_spec or LoRASpec(config.lora.rank, config.lora.alpha, tuple(config.lora.targets))
    return sd3.load(
        config.model.path,
        lora_spec=spec,
        dtype=jnp.dtype(config.model.dtype),
        t5=config.model.t5,
        t5_length=config.model.t5_length,
        remat=config.model.remat,
        place=sharding.place(mesh),
    )


def build(config: ConfigDict, *, training: bool = True) -> Recipe:
    """Check the config and build all that a run needs; nothing random happens here.

    Raises ValueError or FileNotFoundError that names the value, the constraint and the fix.
    """
    check(config)
    mesh = sharding.make_mesh(**config.mesh)
    plan = make_plan(config, sharding.row_shards(mesh))
    train_prompts, test_prompts = load_prompts(config, training)
    mix, test_mix = reward_mixes(config)
    loaded = rewards.load(
        dict.fromkeys(mix.names + test_mix.names), config.reward.options.to_dict()
    )
    for reward in loaded.values():
        getattr(reward, "ready", lambda: None)()  # a remote one raises where nobody answers
    scorer = _scorer(mix, loaded, train_prompts, mesh)
    test_scorer = _scorer(test_mix, loaded, test_prompts, mesh)
    model = load_model(config, mesh)
    sigmas = sde.sigma_schedule(config.sample.steps, model.shift)
    s = config.sample
    process = Process(
        sigmas=tuple(map(float, sigmas)),
        kernel=s.kernel,
        noise_level=s.noise_level,
        window=window(config),
        density=s.density,
        reduction=s.reduction,
    )
    optimiser = update.optimiser(
        config.train.learning_rate,
        warmup_steps=config.train.warmup_steps,
        **{k: config.train[k] for k in ("b1", "b2", "eps", "weight_decay", "max_grad_norm")},
    )
    built = _programs(config, model, mesh, plan, process, optimiser, scorer)
    return Recipe(
        config,
        model,
        mesh,
        plan,
        process,
        optimiser,
        built,
        train_prompts,
        test_prompts,
        scorer,
        test_scorer,
    )


def load_prompts(config: ConfigDict, training: bool) -> tuple[list[Metadata], list[Metadata]]:
    """(train, test) records; generated training prompts keep clear of the test prompts."""
    p = config.prompts
    if p.tasks:
        return tasks.splits(p.tasks.to_dict())
    test = prompts.load(p.test) if p.test else []
    return prompts.load(p.train, exclude=test) if training else [], test


def reward_mixes(config: ConfigDict) -> tuple[Mix, Mix]:
    """Which rewards training and evaluation take, by task where there are several."""
    weights, chosen = config.reward.weights.to_dict(), config.prompts.tasks.to_dict()
    tested = {name: weights.get(name, 0.0) for name in config.eval.rewards} or weights
    return tuple(Mix(w, tasks.reward_weights(chosen, w)) for w in (weights, tested))  # type: ignore


def _scorer(
    mix: Mix, loaded: dict[str, Reward | GraphReward], records: list[Metadata], mesh: Mesh
) -> Scorer:
    def lookup(ids: np.ndarray) -> tuple[list[str], list[Metadata]]:
        chosen = [records[i] for i in ids]
        return [r["prompt"] for r in chosen], chosen

    on_host: dict[str, Reward] = {}
    in_graph: dict[str, GraphReward] = {}
    for name in mix.names:
        reward = loaded[name]
        if isinstance(reward, GraphReward):
            in_graph[name] = reward
        else:
            on_host[name] = reward
    return Scorer(
        mix,
        host.composite(on_host, lookup, mix.applies),
        in_graph,
        graph.composite(in_graph, lambda weights: sharding.replicate(mesh, weights)),
    )


def _programs(
    config: ConfigDict,
    model: sd3.SD3,
    mesh: Mesh,
    plan: Plan,
    process: Process,
    optimiser: Any,
    scorer: Scorer,
) -> Programs:
    s, t = config.sample, config.train
    latent = model.latent_shape(config.model.height, config.model.width)
    called = None
    names = tuple(name for name in scorer.mix.names if name not in scorer.in_graph)
    if config.reward.host_call == "callback" and names:
        called = host.callback(scorer.host, names, mesh, sharding.ROWS)
    objective = update.Objective(t.clip_range, t.kl_beta, t.kl_weighting)
    return Programs(
        sample=programs.sample(
            model,
            mesh,
            process,
            guidance=s.guidance_scale,
            latent=latent,
            same_noise=s.same_noise,
            score=called,
        ),
        accumulate=programs.accumulate(
            model,
            process,
            objective,
            guidance=s.guidance_scale,
            images=plan.images // plan.updates,
        ),
        apply=programs.apply(optimiser, t.ema_decay),
        generate=programs.generate(
            model,
            mesh,
            guidance=config.eval.guidance_scale,
            latent=latent,
            sigmas=sde.sigma_schedule(config.eval.steps, model.shift),
        ),
    )


def trained_steps(config: ConfigDict, key: jax.Array, epoch: int) -> jax.Array:
    """Which of the window's steps this epoch trains: i32 [K], in order."""
    size, k = window(config), config.train.steps or window(config)
    if k == size or config.train.step_choice == "first":
        return jnp.arange(k)
    key = jax.random.fold_in(jax.random.fold_in(key, epoch), 2**31 - 2)
    return jnp.sort(jax.random.permutation(key, size)[:k])


def describe(recipe: Recipe) -> str:
    """What a run prints first: the derived numbers."""
    model, config = recipe.model, recipe.config
    frozen = sum(x.size for part in model.params.values() for x in part.values())
    trained = sum(np.prod(x.shape) for x in model.lora_shapes.values())
    low, high = window_range(config)
    layout = " x ".join(f"{axis} {n}" for axis, n in recipe.mesh.shape.items())
    return "\n".join(
        [
            f"model       {config.model.path}, {frozen / 1e6:.1f} M frozen, {trained / 1e3:.0f} k"
            f" trained, {config.model.height} x {config.model.width} px, {config.model.dtype}",
            f"batch       {recipe.plan} on {recipe.mesh.size} {jax.default_backend()} device(s)"
            f" of {jax.process_count()} process(es), {layout}",
            f"rollout     {config.sample.steps} steps, {config.sample.kernel} noise"
            f" {config.sample.noise_level} on {window(config)} steps within [{low}, {high}),"
            f" guidance {config.sample.guidance_scale}",
            f"update      {config.train.steps or window(config)} steps trained, clip"
            f" {config.train.clip_range:g}, KL {config.train.kl_beta:g},"
            f" learning rate {config.train.learning_rate:g}",
        ]
    )
