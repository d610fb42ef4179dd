"""From a config to a run that an entry point can start: checked, derived, built."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from flowgrpo_jax import programs, sharding, update
from flowgrpo_jax.advantages import Advantage, diversity
from flowgrpo_jax.algorithms import Algorithm, Setup
from flowgrpo_jax.assembly import monitor_settings, parts
from flowgrpo_jax.assembly.batch_plan import Plan, make_plan
from flowgrpo_jax.assembly.rollout_settings import make_advantage, make_window, window
from flowgrpo_jax.assembly.settings import check, guidance, require
from flowgrpo_jax.models import Model
from flowgrpo_jax.regularisation.kl_control import Control
from flowgrpo_jax.regularisation.training_data import Data
from flowgrpo_jax.sampling import excess_noise, sampler, solvers, windows
from flowgrpo_jax.scoring import differentiable
from flowgrpo_jax.scoring.differentiable import Judge
from flowgrpo_jax.scoring.scorer import Scorer
from flowgrpo_jax.types import (
    Conditioning,
    Metadata,
    NamedScores,
    Params,
    Pictures,
    PromptBatch,
    Rollout,
    TrainState,
)


def absent(*_: Any) -> Any:
    raise ValueError("this run has no loss on data: set data.source")


@dataclass(frozen=True)
class Programs:
    """The jitted programs of a run; `programs.py` has their arguments."""

    sample: Callable[..., tuple[Rollout, Pictures, NamedScores]]
    accumulate: Callable[..., update.Carry]
    apply: Callable[..., tuple[TrainState, dict[str, jax.Array]]]
    end_epoch: Callable[[TrainState, jax.Array], TrainState]
    generate: Callable[..., Pictures]
    # Of a loss on data alone
    to_latents: Callable[[Params, jax.Array], jax.Array] = absent
    draw_base: Callable[..., jax.Array] = absent
    add_data: Callable[..., tuple[Params, jax.Array]] = absent


@dataclass(frozen=True)
class Run:
    """This record holds all parts of a run, made from its config, for `train` and `evaluate`.

    Attributes:
      plan: how many images an epoch has, and how they are cut into updates and micro-batches.
      setup: what the loss knows of the rollout, `algorithms.Setup`.
      features: tell images apart where the advantage favours different ones, or None.
      control: finds the weight of each image's KL, or None; data: the loss on data, or None.
      window_start: where the window of an epoch's part begins.
      train_prompts, test_prompts: the prompts of training and those held out, with their metadata.
      scorer, test_scorer: the rewards of training and of evaluation.
    """

    config: ConfigDict
    model: Model
    mesh: Mesh
    plan: Plan
    setup: Setup
    algorithm: Algorithm
    advantage: Advantage
    features: diversity.Features | None
    control: Control | None
    data: Data | None
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

    @property
    def keep_pixels(self) -> bool:
        """Whether an epoch's pictures are looked at once more after they were scored."""
        return diversity.needs_pixels(self.config.advantage.get("diversity", ""))

    @cached_property
    def empty(self) -> Conditioning:
        """The empty prompt, which guidance moves away from."""
        return self.encode([""])

    def places(self, key: jax.Array, epoch: int) -> list[tuple[jax.Array, int]]:
        """Return where the window of each of the epoch's parts begins, and which tail follows."""
        tails = self.setup.process.tails
        count = self.plan.parts // tails
        starts = [self.window_start(key, epoch, part, count) for part in range(count)]
        return [(start, tail) for start in starts for tail in range(tails)]

    def encode(self, texts: list[str]) -> Conditioning:
        return parts.encode(self.config, self.model, self.mesh, texts)

    def reward_inputs(self, ids: np.ndarray) -> dict[str, Any]:
        """Return the judge's inputs for an epoch's prompts, i32 [P]; nothing without a judge."""
        if not self.algorithm.reward_gradient:
            return {}
        vae = self.model.params["vae"]
        return differentiable.inputs(self.scorer, vae, ids, self.algorithm.texts)

    def put(self, state: Any) -> Any:
        """Put a training state, or a part of it, onto the devices."""
        return sharding.put_state(self.mesh, state, self.model.rules)

    def micro_batches(self, batch: PromptBatch) -> Iterator[tuple[jax.Array, ...]]:
        """Yield each micro-batch's prompt ids, rows of the conditioning and places in the group,
        i32 [M]."""
        plan = self.plan
        rows = np.repeat(np.arange(plan.groups, dtype=np.int32), plan.group_size)
        places = np.tile(np.arange(plan.group_size, dtype=np.int32), plan.groups)
        for i in range(0, plan.images, plan.micro_batch):
            part = slice(i, i + plan.micro_batch)
            yield sharding.split_rows(self.mesh, (batch.ids[rows[part]], rows[part], places[part]))

    def named_policy(self, state: TrainState, name: str) -> Params:
        """Return the parameters of "policy", of "reference" or of a copy."""
        if name == "policy":
            return state.policy
        if name == "reference" and name not in state.copies:
            return self.model.reference(state.policy)
        return state.copies[name]


def build_run(config: ConfigDict, *, training: bool = True) -> Run:
    """Check the config and build all that a run needs; nothing random happens here.

    Raises ValueError or FileNotFoundError that names the value, the constraint and the fix.
    """
    check(config)
    monitor_settings.check_monitors(config)
    mesh = sharding.make_mesh(**config.mesh)
    plan = make_plan(config, sharding.row_shards(mesh))
    parts.check_size(config, parts.describe_model(config, mesh))
    data = parts.make_data(config, plan, sharding.row_shards(mesh)) if training else None
    features = parts.make_features(config)
    train_prompts, test_prompts = parts.load_prompts(config, training)
    trained, tested = parts.scorers(config, mesh, train_prompts, test_prompts, training=training)
    algorithm = parts.make_algorithm(config)
    if algorithm.reward_gradient:
        differentiable.check(trained, config.algorithm.name)
    model = parts.load_model(config, mesh)
    setup = parts.make_setup(config, model, algorithm, sharding.row_shards(mesh))
    optimiser = parts.make_optimiser(config)
    score = trained.inside_program() if config.reward.host_call == "callback" else None
    judge = parts.make_judge(model, algorithm, trained.trained)
    built = make_programs(config, model, mesh, plan, setup, algorithm, optimiser, score, judge)
    if data:
        built = with_data(built, config, model, mesh, setup, data)
    return Run(
        config,
        model,
        mesh,
        plan,
        setup,
        algorithm,
        make_advantage(config, algorithm),
        features,
        parts.make_control(config),
        data,
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
    decode = parts.make_decode(config, model, mesh)
    require(
        model.heads % tensor == 0,
        f"mesh.tensor={tensor} does not divide the transformer's {model.heads} heads: choose a"
        " divisor, or cut by mesh.fsdp",
    )
    latent = model.latent_shape(config.model.height, config.model.width)
    return Programs(
        sample=programs.sample(
            guided,
            decode,
            mesh,
            setup.process,
            latent=latent,
            neighbor_noise=s.neighbor_noise,
            score=score,
            tape=t.tape,
        ),
        accumulate=programs.accumulate(
            guided, algorithm, setup, images=plan.images // plan.updates, judge=judge
        ),
        apply=programs.apply(optimiser, t.ema_decay),
        end_epoch=programs.end_epoch(algorithm),
        generate=programs.generate(
            sampler.guided(model.velocity, eval_scale, model.guidance),
            decode,
            mesh,
            latent=latent,
            sigmas=parts.sigmas(model, config, config.eval.steps),
            solver=solvers.load(config.eval.solver),
        ),
    )


def with_data(
    built: Programs, config: ConfigDict, model: Model, mesh: Mesh, setup: Setup, data: Data
) -> Programs:
    """Return the programs with those of the loss on data. Guidance is none, or else an input."""
    s = config.sample
    scale = s.guidance_scale if model.guidance == "input" else 1.0
    plain = sampler.guided(model.velocity, scale, model.guidance)
    latent = model.latent_shape(config.model.height, config.model.width)
    solver = setup.process.solver
    draw = {"latent": latent, "sigmas": setup.process.sigmas, "solver": solver}
    return replace(
        built,
        to_latents=programs.to_latents(model.to_latents) if data.source else absent,
        draw_base=programs.draw_base(plain, mesh, **draw),
        add_data=programs.add_data(
            plain,
            images=data.images,
            weight=data.weight,
            leaves=setup.process.branches.leaves,
        ),
    )


def run_summary(run: Run) -> str:
    """Return the first lines that a run prints: the numbers derived from its config."""
    model, config = run.model, run.config
    parts = (model.params | model.text_shapes).values()
    frozen = sum(x.size for part in parts for x in part.values())
    trained = sum(np.prod(x.shape) for x in model.trained_shapes.values())
    frozen -= 0 if model.lora_spec.rank else trained  # in full fine-tuning they are among them
    layout = " x ".join(f"{axis} {n}" for axis, n in run.mesh.shape.items())
    after = config.train.decay_steps
    decay = f", falling after {after} optimiser steps" if after else ""
    chosen = window(config, run.algorithm)
    problem = excess_noise.warning(config.sample.kernel, run.setup.process, chosen)
    return "\n".join(
        [
            f"model       {config.model.path}, {frozen / 1e6:.1f} M frozen, {trained / 1e3:.0f} k"
            f" trained, {config.model.height} x {config.model.width} px, {config.model.dtype}",
            f"batch       {run.plan} on {run.mesh.size} {jax.default_backend()} device(s)"
            f" of {jax.process_count()} process(es), {layout}",
            f"rollout     {config.sample.steps} steps of {config.sample.solver},"
            f" {_noise(config, chosen)}, guidance {config.sample.guidance_scale}",
            f"update      {config.algorithm.name}: {run.algorithm.summary},"
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
