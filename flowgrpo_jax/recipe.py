"""From a config to a run that an entry point can start: checked, derived, built."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from flowgrpo_jax import (
    excess_noise,
    parts,
    programs,
    sampler,
    sharding,
    solvers,
    update,
    windows,
)
from flowgrpo_jax.advantages import Advantage
from flowgrpo_jax.algorithms import Algorithm, Setup
from flowgrpo_jax.batch_plan import Plan, make_plan
from flowgrpo_jax.models import Model
from flowgrpo_jax.monitors import true_loss
from flowgrpo_jax.scoring import differentiable
from flowgrpo_jax.scoring.differentiable import Judge
from flowgrpo_jax.scoring.scorer import Scorer
from flowgrpo_jax.settings import check, guidance, make_window, require, window
from flowgrpo_jax.types import (
    Conditioning,
    Metadata,
    NamedScores,
    Params,
    Pictures,
    Rollout,
    TrainState,
)


@dataclass(frozen=True)
class Programs:
    """The jitted programs of a run; `programs.py` has their arguments."""

    sample: Callable[..., tuple[Rollout, Pictures, NamedScores]]
    accumulate: Callable[..., update.Carry]
    apply: Callable[..., tuple[TrainState, dict[str, jax.Array]]]
    end_epoch: Callable[[TrainState, jax.Array], TrainState]
    generate: Callable[..., Pictures]


@dataclass(frozen=True)
class Recipe:
    config: ConfigDict
    model: Model
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
        return parts.encode(self.config, self.model, self.mesh, texts)

    def judged(self, ids: np.ndarray) -> dict[str, Any]:
        """Return the judge's inputs for an epoch's prompts, i32 [P]; nothing without a judge."""
        if not self.algorithm.reward_gradient:
            return {}
        vae = self.model.params["vae"]
        return differentiable.inputs(self.scorer, vae, ids, self.algorithm.texts)

    def put(self, state: Any) -> Any:
        """Put a training state, or a part of it, onto the devices."""
        return sharding.put_state(self.mesh, state, self.model.rules)

    def named_policy(self, state: TrainState, name: str) -> Params:
        """Return the parameters of "policy", of "reference" or of a copy."""
        if name == "policy":
            return state.policy
        if name == "reference" and name not in state.copies:
            return self.model.reference(state.policy)
        return state.copies[name]


def build(config: ConfigDict, *, training: bool = True) -> Recipe:
    """Check the config and build all that a run needs; nothing random happens here.

    Raises ValueError or FileNotFoundError that names the value, the constraint and the fix.
    """
    check(config)
    _check_monitors(config)
    mesh = sharding.make_mesh(**config.mesh)
    plan = make_plan(config, sharding.row_shards(mesh))
    parts.check_size(config, parts.describe_model(config, mesh))
    train_prompts, test_prompts = parts.load_prompts(config, training)
    trained, tested = parts.scorers(config, mesh, train_prompts, test_prompts, training=training)
    algorithm = parts.make_algorithm(config)
    if algorithm.reward_gradient:
        differentiable.check(trained, config.algorithm.name)
    model = parts.load_model(config, mesh)
    setup = parts.make_setup(config, model, algorithm)
    optimiser = parts.make_optimiser(config)
    score = trained.inside_program() if config.reward.host_call == "callback" else None
    judge = parts.make_judge(model, algorithm, trained.trained)
    built = make_programs(config, model, mesh, plan, setup, algorithm, optimiser, score, judge)
    return Recipe(
        config,
        model,
        mesh,
        plan,
        setup,
        algorithm,
        parts.make_advantage(config),
        make_window(config, algorithm),
        optimiser,
        built,
        train_prompts,
        test_prompts,
        trained,
        tested,
    )


def make_programs(
    config: ConfigDict,
    model: Model,
    mesh: Mesh,
    plan: Plan,
    setup: Setup,
    algorithm: Algorithm,
    optimiser: Any,
    score: programs.HostScore | None = None,
    judge: Judge | None = None,
) -> Programs:
    """The programs; `model` may be one that is only described."""
    s, t, tensor = config.sample, config.train, sharding.head_shards(mesh)
    scale = guidance(s.guidance_scale, "sample.guidance_scale", model.guidance)
    eval_scale = guidance(config.eval.guidance_scale, "eval.guidance_scale", model.guidance)
    guided = sampler.guided(model.velocity, scale, model.guidance)
    require(
        model.heads % tensor == 0,
        f"mesh.tensor={tensor} does not divide the transformer's {model.heads} heads: choose a"
        " divisor, or cut by mesh.fsdp",
    )
    latent = model.latent_shape(config.model.height, config.model.width)
    return Programs(
        sample=programs.sample(
            guided,
            model.decode,
            mesh,
            setup.process,
            latent=latent,
            same_noise=s.same_noise,
            neighbor_noise=s.neighbor_noise,
            score=score,
        ),
        accumulate=programs.accumulate(
            guided, algorithm, setup, images=plan.images // plan.updates, judge=judge
        ),
        apply=programs.apply(optimiser, t.ema_decay),
        end_epoch=programs.end_epoch(algorithm),
        generate=programs.generate(
            sampler.guided(model.velocity, eval_scale, model.guidance),
            model.decode,
            mesh,
            latent=latent,
            sigmas=parts.sigmas(model, config, config.eval.steps),
            solver=solvers.load(config.eval.solver),
        ),
    )


def _check_monitors(config: ConfigDict) -> None:
    """Raise ValueError where an alarm of the monitors is to raise a KL that there cannot be, or
    where there are no true pictures to watch."""
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


def with_options(run: Recipe, options: dict[str, Any]) -> Recipe:
    """Return the run with other options of its algorithm, which keeps the same copies and draws the
    same images. `config` stays as it was."""
    config = run.config.copy_and_resolve_references()
    config.algorithm.options.update(options)
    algorithm = parts.make_algorithm(config)
    judge = parts.make_judge(run.model, algorithm, run.scorer.trained)
    same = run.model, run.mesh, run.plan, run.setup
    made = make_programs(config, *same, algorithm, run.optimiser, judge=judge)
    changed = replace(run.programs, accumulate=made.accumulate, end_epoch=made.end_epoch)
    return replace(run, algorithm=algorithm, programs=changed)


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
