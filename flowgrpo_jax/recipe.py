"""From a config to the parts that an entry point runs: checked, derived, built.

With settings.py the only file below the entry points that sees a config; everything else that it
calls takes plain arguments.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from flowgrpo_jax import (
    advantages,
    algorithms,
    excess_noise,
    programs,
    prompts,
    rewards,
    sde,
    sharding,
    solvers,
    text_cache,
    update,
    windows,
)
from flowgrpo_jax.advantages import Advantage
from flowgrpo_jax.algorithms import Algorithm, Setup
from flowgrpo_jax.models import sd3
from flowgrpo_jax.models.lora import LoRASpec
from flowgrpo_jax.prompts import tasks
from flowgrpo_jax.sampler import Process
from flowgrpo_jax.scoring import graph, host
from flowgrpo_jax.scoring.reward_weights import RewardWeights
from flowgrpo_jax.settings import Plan, check, guidance, make_plan, make_window, require, window
from flowgrpo_jax.types import (
    Conditioning,
    GraphReward,
    Metadata,
    Params,
    Pictures,
    PromptBatch,
    Reward,
    Rollout,
    Scores,
    TrainState,
)

# Knobs of `config.train` that `update.optimiser` takes by the same name.
ADAMW = ("b1", "b2", "eps", "weight_decay", "max_grad_norm", "warmup_steps", "decay_steps")


@dataclass(frozen=True)
class Programs:
    """The jitted programs of a run; `programs.py` has their arguments."""

    sample: Callable[..., tuple[Rollout, Pictures, Scores]]
    accumulate: Callable[..., update.Carry]
    apply: Callable[..., tuple[TrainState, dict[str, jax.Array]]]
    end_epoch: Callable[[TrainState], TrainState]
    generate: Callable[..., Pictures]


@dataclass(frozen=True)
class Scorer:
    """The rewards of a prompt source: those on the host, those in the graph, and their weights."""

    mix: RewardWeights
    host: host.Score
    in_graph: dict[str, GraphReward]
    graph: graph.Score


@dataclass(frozen=True)
class Recipe:
    config: ConfigDict
    model: sd3.SD3
    mesh: Mesh
    plan: Plan
    setup: Setup
    algorithm: Algorithm
    advantage: Advantage
    window_start: windows.Start
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

    @cached_property
    def empty(self) -> Conditioning:
        """The empty prompt, which guidance moves away from."""
        return self.encode([""])

    def encode(self, texts: list[str]) -> Conditioning:
        return encode(self.config, self.model, self.mesh, texts)

    def named_policy(self, state: TrainState, name: str) -> Params:
        """Return the parameters of "policy", of "reference" or of a copy."""
        if name == "policy":
            return state.policy
        if name == "reference" and name not in state.copies:
            return self.model.reference(state.policy)
        return state.copies[name]


_fingerprint = cache(text_cache.fingerprint)  # a run's model does not change


def encode(
    config: ConfigDict, model: sd3.SD3, mesh: Mesh, texts: list[str], *, strict: bool = False
) -> Conditioning:
    """The prompts' states on every device, through the cache where there is one.

    Args:
      strict: raise OSError when the cache cannot be written.
    """
    c = config.model
    if not c.text_cache:
        return sharding.replicate(mesh, model.encode(texts))
    mark = _fingerprint(model.directory, dtype=c.dtype, t5=c.t5, t5_length=c.t5_length)
    cond = text_cache.encode_cached(
        model.encode,
        texts,
        c.text_cache,
        mark,
        strict=strict,
        allgather=sharding.allgather,
        to_host=sharding.to_host,
    )
    return sharding.replicate(mesh, cond)


def load_model(
    config: ConfigDict, mesh: Mesh, lora_spec: LoRASpec | None = None, *, texts_alone: bool = False
) -> sd3.SD3:
    """The config's model, its weights on the mesh. Raises what `sd3.load` does."""
    spec = lora_spec or LoRASpec(config.lora.rank, config.lora.alpha, tuple(config.lora.targets))
    return sd3.load(
        config.model.path,
        lora_spec=spec,
        dtype=jnp.dtype(config.model.dtype),
        t5=config.model.t5,
        t5_length=config.model.t5_length,
        remat=config.model.remat,
        place=sharding.place(mesh),
        texts_alone=texts_alone,
        attention=config.model.attention,
        gather=sharding.gather_weights(mesh),
    )


def build(config: ConfigDict, *, training: bool = True) -> Recipe:
    """Check the config and build all that a run needs; nothing random happens here.

    Raises ValueError or FileNotFoundError that names the value, the constraint and the fix.
    """
    check(config)
    mesh = sharding.make_mesh(**config.mesh)
    plan = make_plan(config, sharding.row_shards(mesh))
    check_size(config)
    train_prompts, test_prompts = load_prompts(config, training)
    scorer, test_scorer = scorers(config, mesh, train_prompts, test_prompts, training=training)
    model = load_model(config, mesh)
    algorithm = make_algorithm(config)
    setup = make_setup(config, model.shift, algorithm)
    optimiser = make_optimiser(config)
    score = _callback(config, scorer, mesh)
    built = make_programs(config, model, mesh, plan, setup, algorithm, optimiser, score)
    return Recipe(
        config,
        model,
        mesh,
        plan,
        setup,
        algorithm,
        make_advantage(config),
        make_window(config, algorithm),
        optimiser,
        built,
        train_prompts,
        test_prompts,
        scorer,
        test_scorer,
    )


def check_size(config: ConfigDict) -> None:
    """Raises ValueError for pictures that the model cannot draw, before any weights are read."""
    c = config.model
    parts = sd3.find_architecture(c.path, t5=c.t5)
    try:
        parts.latent_shape(c.height, c.width)
    except ValueError as error:
        raise ValueError(f"model.height and model.width: {error}") from error


def drop_frozen(model: sd3.SD3, algorithm: Algorithm) -> sd3.SD3:
    """Return the model without the transformer's frozen weights where nothing reads them: in full
    fine-tuning the trained ones take their place, and only the reference policy needs both."""
    if model.lora_spec.rank or "reference" in algorithm.reads:
        return model
    kept = {path: x for path, x in model.base.items() if path not in model.trained_shapes}
    return replace(model, params={**model.params, "transformer": kept})


def make_algorithm(config: ConfigDict) -> Algorithm:
    return algorithms.load(config.algorithm.name, config.algorithm.options.to_dict())


def make_advantage(config: ConfigDict) -> Advantage:
    c, size = config.advantage, config.sample.group_size
    return advantages.load(c.name, c.options.to_dict(), group_size=size, clip=c.clip)


def make_setup(config: ConfigDict, shift: float, algorithm: Algorithm) -> Setup:
    """Return how images are drawn, with the sigmas of a model whose schedule has this shift."""
    s, size = config.sample, window(config, algorithm).size
    sigmas = tuple(map(float, sde.sigma_schedule(s.steps, shift)))
    process = Process(
        sigmas=sigmas,
        kernel=sde.load(s.kernel),
        noise_level=s.noise_level,
        window=size,
        density=s.density,
        reduction=s.reduction,
        solver=solvers.load(s.solver),
        by_start=windows.compressed(sigmas, shift, size, s.tail),
    )
    return Setup(process, s.group_size)


def make_optimiser(config: ConfigDict) -> Any:
    return update.optimiser(
        config.train.learning_rate, **{knob: config.train[knob] for knob in ADAMW}
    )


def load_prompts(config: ConfigDict, training: bool) -> tuple[list[Metadata], list[Metadata]]:
    """(train, test) records; generated training prompts keep clear of the test prompts."""
    p = config.prompts
    if p.tasks:
        return tasks.splits(p.tasks.to_dict())
    test = prompts.load(p.test) if p.test else []
    return prompts.load(p.train, exclude=test) if training else [], test


def source(config: ConfigDict, split: str, record: Metadata) -> str:
    """Return the prompt source of a record of a split ("train" or "test")."""
    chosen = config.prompts.tasks
    return chosen[record["task"]].get(split, "") if chosen else config.prompts[split]


def draw_prompts(config: ConfigDict, records: list[Metadata], epoch: int) -> PromptBatch:
    """The prompts of an epoch: a pure function of the seed and the epoch."""
    return prompts.sample(
        records,
        config.sample.groups,
        seed=config.seed,
        epoch=epoch,
        tag_weights=config.prompts.tag_weights.to_dict(),
        task_weights=tasks.weights(config.prompts.tasks.to_dict()),
    )


def reward_mixes(
    config: ConfigDict, *, training: bool = True
) -> tuple[RewardWeights, RewardWeights]:
    """Return the reward weights of training and of evaluation, by task if there are several.

    Training has no rewards unless `training`; evaluation has none in a run that never evaluates.
    """
    weights, chosen = config.reward.weights.to_dict(), config.prompts.tasks.to_dict()
    tested = {name: weights.get(name, 0.0) for name in config.eval.rewards} or weights
    tested = {} if training and not config.eval.every else tested
    weights = weights if training else {}
    return tuple(RewardWeights(w, tasks.reward_weights(chosen, w)) for w in (weights, tested))  # type: ignore


def scorers(
    config: ConfigDict,
    mesh: Mesh,
    train_prompts: list[Metadata],
    test_prompts: list[Metadata],
    *,
    training: bool = True,
) -> tuple[Scorer, Scorer]:
    """Make the scorers of training and of evaluation.

    Training has no rewards unless `training`; evaluation has none in a run that never evaluates.
    Both scorers share the loaded rewards and their arrays on the devices. Raises the errors of
    loading a reward, ValueError for prompts that a reward cannot judge, and RuntimeError where a
    reward on another machine does not answer.
    """
    mix, test_mix = reward_mixes(config, training=training)
    test_mix = RewardWeights({}) if training and not test_prompts else test_mix
    loaded = rewards.load(
        dict.fromkeys(mix.names + test_mix.names), config.reward.options.to_dict()
    )
    for reward in loaded.values():
        getattr(reward, "ready", lambda: None)()  # a remote one raises where nobody answers
    _check_records(loaded, mix, train_prompts, lambda record: source(config, "train", record))
    _check_records(loaded, test_mix, test_prompts, lambda record: source(config, "test", record))
    seconds = config.reward.timeout or None
    loaded = {
        name: reward if isinstance(reward, GraphReward) else host.Limited(reward, seconds)
        for name, reward in loaded.items()
    }
    place = graph.place_once(lambda array: sharding.replicate(mesh, array))
    train_scorer = _scorer(mix, loaded, train_prompts, place)
    return train_scorer, _scorer(test_mix, loaded, test_prompts, place)


def _check_records(
    loaded: dict[str, Reward | GraphReward],
    mix: RewardWeights,
    records: list[Metadata],
    source_of: Callable[[Metadata], str],
) -> None:
    """Let rewards say which of the prompts that they are for they cannot judge.

    Raises ValueError that names the prompt's file and line.
    """
    checks = {name: loaded[name].check for name in mix.names if hasattr(loaded[name], "check")}  # type: ignore
    for name, check_record in checks.items():
        for record in records:
            if mix.applies(name, record):
                try:
                    check_record(record)
                except ValueError as error:
                    where = prompts.place(record["prompt"], source_of(record))
                    raise ValueError(f"{where}: reward {name!r}: {error}") from error


def _scorer(
    mix: RewardWeights,
    loaded: dict[str, Reward | GraphReward],
    records: list[Metadata],
    place: Callable[[Any], Any],
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
        graph.composite(in_graph, place),
    )


def _callback(config: ConfigDict, scorer: Scorer, mesh: Mesh) -> programs.HostScore | None:
    """The host's rewards as a part of the sampling program, where the recipe wants that."""
    names = tuple(name for name in scorer.mix.names if name not in scorer.in_graph)
    if config.reward.host_call != "callback" or not names:
        return None
    heads = sharding.head_shards(mesh)
    require(
        heads == 1,
        f"reward.host_call='callback' with mesh.tensor={heads}: every image would be scored that"
        " often; use 'overlap'",
    )
    return host.callback(scorer.host, names, mesh, sharding.ROWS)


def make_programs(
    config: ConfigDict,
    model: sd3.SD3,
    mesh: Mesh,
    plan: Plan,
    setup: Setup,
    algorithm: Algorithm,
    optimiser: Any,
    score: programs.HostScore | None = None,
) -> Programs:
    """The programs; `model` may be one that is only described."""
    s, t, tensor = config.sample, config.train, sharding.head_shards(mesh)
    scale = guidance(s.guidance_scale, "sample.guidance_scale")
    eval_scale = guidance(config.eval.guidance_scale, "eval.guidance_scale")
    require(
        model.heads % tensor == 0,
        f"mesh.tensor={tensor} does not divide the transformer's {model.heads} heads: choose a"
        " divisor, or cut by mesh.fsdp",
    )
    latent = model.latent_shape(config.model.height, config.model.width)
    return Programs(
        sample=programs.sample(
            model.velocity,
            model.decode,
            mesh,
            setup.process,
            guidance=scale,
            latent=latent,
            same_noise=s.same_noise,
            score=score,
        ),
        accumulate=programs.accumulate(
            model.velocity,
            algorithm,
            setup,
            guidance=scale,
            images=plan.images // plan.updates,
        ),
        apply=programs.apply(optimiser, t.ema_decay),
        end_epoch=programs.end_epoch(algorithm),
        generate=programs.generate(
            model.velocity,
            model.decode,
            mesh,
            guidance=eval_scale,
            latent=latent,
            sigmas=tuple(map(float, sde.sigma_schedule(config.eval.steps, model.shift))),
            solver=solvers.load(config.eval.solver),
        ),
    )


def summary(recipe: Recipe) -> str:
    """Return the first lines that a run prints: the numbers derived from its config."""
    model, config = recipe.model, recipe.config
    parts = (model.params | model.text_shapes).values()
    frozen = sum(x.size for part in parts for x in part.values())
    trained = sum(np.prod(x.shape) for x in model.trained_shapes.values())
    frozen -= 0 if model.lora_spec.rank else trained  # in full fine-tuning they are among them
    layout = " x ".join(f"{axis} {n}" for axis, n in recipe.mesh.shape.items())
    after = config.train.decay_steps
    decay = f", falling after {after} updates" if after else ""
    chosen = window(config, recipe.algorithm)
    problem = excess_noise.warning(config.sample.kernel, recipe.setup.process, chosen)
    return "\n".join(
        [
            f"model       {config.model.path}, {frozen / 1e6:.1f} M frozen, {trained / 1e3:.0f} k"
            f" trained, {config.model.height} x {config.model.width} px, {config.model.dtype}",
            f"batch       {recipe.plan} on {recipe.mesh.size} {jax.default_backend()} device(s)"
            f" of {jax.process_count()} process(es), {layout}",
            f"rollout     {config.sample.steps} steps of {config.sample.solver},"
            f" {_noise(config, chosen)}, guidance {config.sample.guidance_scale}",
            f"update      {config.algorithm.name}: {recipe.algorithm.summary},"
            f" learning rate {config.train.learning_rate:g}{decay}",
            *([f"warning     {problem}"] if problem else []),
        ]
    )


def _noise(config: ConfigDict, window: windows.Window) -> str:
    if not window.size:
        return "the ODE without noise"
    s, (size, low, high) = config.sample, window
    moving = f", {s.window_schedule}" if high - low > size else ""
    return f"{s.kernel} noise {s.noise_level} on {size} steps within [{low}, {high}){moving}"
