"""The parts of a run, each made from its section of a config.

Only this file, run.py, batch_plan.py and settings.py see a config below the entry points: all
else that they call takes plain arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from flowgrpo_jax import algorithms, models, prompts, rewards, sharding, update
from flowgrpo_jax.advantages import diversity
from flowgrpo_jax.algorithms import Algorithm, Setup
from flowgrpo_jax.assembly.batch_plan import Plan, derived_micro_batch
from flowgrpo_jax.assembly.rollout_settings import branches, window
from flowgrpo_jax.models import Family, Model, attention, decoding, products, quantised
from flowgrpo_jax.models.lora import LoRASpec
from flowgrpo_jax.prompts import tasks
from flowgrpo_jax.regularisation import kl_control, training_data
from flowgrpo_jax.sampling import sde, solvers, tails
from flowgrpo_jax.sampling.sampler import Process
from flowgrpo_jax.scoring import scorer
from flowgrpo_jax.scoring.differentiable import Judge, judge
from flowgrpo_jax.scoring.reward_weights import RewardWeights
from flowgrpo_jax.scoring.scorer import Scorer, Source
from flowgrpo_jax.storage import text_cache
from flowgrpo_jax.types import Conditioning, GraphReward, Metadata, PromptBatch

# Knobs of `config.train` that `update.optimiser` takes by the same name.
ADAMW = ("b1", "b2", "eps", "weight_decay", "max_grad_norm", "warmup_steps", "decay_steps")


@lru_cache(maxsize=4)  # a run's model does not change
def _fingerprint(directory: Path, text_files: Callable[[], list[Path]], **settings: Any) -> str:
    return text_cache.fingerprint(directory, text_files(), **settings)


def encode(
    config: ConfigDict, model: Model, mesh: Mesh, texts: list[str], *, strict: bool = False
) -> Conditioning:
    """The prompts' states on every device, through the cache where there is one.

    Args:
      strict: raise OSError when the cache cannot be written.
    """
    c = config.model
    if not c.text_cache:
        return sharding.replicate(mesh, model.encode(texts))
    mark = _fingerprint(model.directory, model.text_files, dtype=c.dtype, **c.options)
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


def load_model(config: ConfigDict, mesh: Mesh, *, texts_alone: bool = False) -> Model:
    """The config's model, its weights on the mesh. Raises what `Family.load` does."""
    family = models.find(config.model.path, config.model.family)
    return family.load(
        config.model.path,
        place=sharding.place(mesh, family.rules),
        texts_alone=texts_alone,
        **model_settings(config, family, mesh),
    )


def describe_model(config: ConfigDict, mesh: Mesh) -> Model:
    """The config's model without its weights; nothing is allocated."""
    family = models.find(config.model.path, config.model.family)
    return family.describe(config.model.path, **model_settings(config, family, mesh))


def model_settings(config: ConfigDict, family: Family, mesh: Mesh) -> dict[str, Any]:
    """Return the settings that `load` and `describe` of a family take.

    Raises ValueError for options and forms of storage that the family does not have.
    """
    c = config.model
    targets = tuple(config.lora.targets) or family.targets
    return {
        "lora_spec": LoRASpec(config.lora.rank, config.lora.alpha, targets),
        "dtype": jnp.dtype(c.dtype),
        "remat": c.remat,
        "attention": attention.load(c.attention, mesh, c.dtype),
        "product": products.load(c.product_dtype, mesh, c.dtype),
        "gather": sharding.gather_weights(mesh, family.rules),
        **quantised.setting(c.base_dtype, config.lora.rank, family.base_dtypes),
        **models.settings_of(family, c.options.to_dict(), "config.model.options"),
    }


def check_size(config: ConfigDict, model: Model) -> None:
    """Raise ValueError for pictures that the model cannot draw, before any weights are read."""
    try:
        model.latent_shape(config.model.height, config.model.width)
    except ValueError as error:
        raise ValueError(f"model.height and model.width: {error}") from error


def make_decode(config: ConfigDict, model: Model, mesh: Mesh) -> decoding.Decode:
    """Return `model.decode` of as many pictures at once as the recipe has, or as the memory has
    room for."""
    c = config.model
    return decoding.in_parts(
        model.decode, mesh, c.decode_batch or decoding.automatic(c.height, c.width)
    )


def drop_frozen(model: Model, algorithm: Algorithm) -> Model:
    """Return the model without the transformer's frozen weights where nothing reads them: in full
    fine-tuning the trained ones take their place, and only a fixed reference needs both."""
    if model.lora_spec.rank or "reference" in set(algorithm.reads) - set(algorithm.copies):
        return model
    kept = {path: x for path, x in model.base.items() if path not in model.trained_shapes}
    return replace(model, params={**model.params, "transformer": kept})


def make_algorithm(config: ConfigDict) -> Algorithm:
    algorithm = algorithms.load(config.algorithm.name, config.algorithm.options.to_dict())
    moves = config.kl.reset_above or config.kl.reset_every
    return algorithms.keep_reference(algorithm) if config.kl.name and moves else algorithm


def make_features(config: ConfigDict) -> diversity.Features | None:
    name = config.advantage.get("diversity", "")
    return diversity.load(name) if name else None


def make_control(config: ConfigDict) -> kl_control.Control | None:
    c = config.kl
    if not c.name:
        return None
    names = reward_weights(config)[0].names
    resets = {"reset_above": c.reset_above, "reset_every": c.reset_every}
    return kl_control.load(c.name, c.options.to_dict(), names, **resets)


def make_data(config: ConfigDict, plan: Plan, devices: int) -> training_data.Data | None:
    """Return the loss on data, or None without one. Raises what `training_data.load` does.

    Args:
      devices: the equal parts that the batch is cut into.
    """
    c = config.data
    if not (c.source and c.weight):
        return None
    if c.source == training_data.BASE and not config.lora.rank:
        raise ValueError(
            "data.source='base' with lora.rank=0: in full fine-tuning the base is given up; draw"
            " its pictures before (python -m flowgrpo_jax.generate) and name their folder"
        )
    source = training_data.load(c.source, config.model.height, config.model.width)
    sizes = [m for m in range(devices, c.images + 1, devices) if c.images % m == 0]
    size = derived_micro_batch(sizes, plan.micro_batch)
    return training_data.Data(source, c.weight, c.images, size, c.every, c.own_step)


def sigmas(model: Model, config: ConfigDict, steps: int) -> tuple[float, ...]:
    """Return the model's schedule for the config's pictures: steps + 1 values, hashable."""
    return tuple(map(float, model.sigmas(steps, config.model.height, config.model.width)))


def make_setup(config: ConfigDict, model: Model, algorithm: Algorithm, shards: int = 1) -> Setup:
    """Return how images are drawn for training.

    Args:
      shards: the equal parts that the batch is cut into, sharding.row_shards.
    """
    s, (size, low, high) = config.sample, window(config, algorithm)
    schedule, strides = sigmas(model, config, s.steps), tuple(s.strides)
    shift = model.shift(config.model.height, config.model.width)
    process = Process(
        sigmas=schedule,
        kernel=sde.load(s.kernel),
        noise_level=s.noise_level,
        window=size,
        path=algorithm.records == "path",
        density=s.density,
        reduction=s.reduction,
        solver=solvers.load(s.solver),
        by_start=tails.strided(schedule, size, strides)
        or tails.compressed(schedule, shift, size, s.tail),
        tails=len(strides),
        span=(low, high),
        branches=branches(config),
    )
    return Setup(process, s.group_size, shards)


def make_judge(
    model: Model, algorithm: Algorithm, trained: Mapping[str, GraphReward]
) -> Judge | None:
    """Return the rewards as a function to be differentiated, for an algorithm that needs it."""
    return judge(model.levels, trained) if algorithm.reward_gradient else None


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


def prompt_place(config: ConfigDict, split: str, record: Metadata) -> str:
    """Say where a record of a split ("train" or "test") is in its source, for errors about it."""
    chosen = config.prompts.tasks
    source = chosen[record["task"]].get(split, "") if chosen else config.prompts[split]
    return prompts.place(record, source)


def draw_prompts(config: ConfigDict, records: list[Metadata], epoch: int) -> PromptBatch:
    """The prompts of an epoch, one a group: a pure function of the seed and the epoch.

    Parts of the epoch with other tails, and with `sample.same_prompts` all its parts, have the same
    ones.
    """
    s, weights = config.sample, tasks.weights(config.prompts.tasks.to_dict())
    ways, own = len(s.strides), 1 if s.same_prompts else s.windows
    each = s.groups // (s.windows * ways)
    drawn = prompts.sample(
        records,
        own * each,
        seed=config.seed,
        epoch=epoch,
        tag_weights=config.prompts.tag_weights.to_dict(),
        task_weights=tasks.turn(weights, epoch) if config.prompts.alternate else weights,
    )
    groups = np.arange(own * each).reshape(own, 1, each)
    return prompts.chosen(drawn, np.broadcast_to(groups, (s.windows, ways, each)).ravel())


def reward_weights(
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
    """Make the scorers of training and of evaluation, for which see `reward_weights`.

    Raises the errors of loading a reward and those of `scorer.scorers`.
    """
    weights, test_weights = reward_weights(config, training=training)
    test_weights = RewardWeights({}) if training and not test_prompts else test_weights
    names = dict.fromkeys(weights.names + test_weights.names)
    trained, tested = scorer.scorers(
        rewards.load(names, config.reward.options.to_dict()),
        [
            Source(weights, train_prompts, partial(prompt_place, config, "train")),
            Source(test_weights, test_prompts, partial(prompt_place, config, "test")),
        ],
        mesh,
        timeout=config.reward.timeout or None,
        threads=config.reward.threads,
    )
    return trained, tested
