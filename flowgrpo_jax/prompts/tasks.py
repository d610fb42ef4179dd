"""Several tasks in one run: each with its prompts, its frequency and its rewards.

`prompts.tasks` of a recipe is {task: {"train": source, "test": source, "weight": frequency,
"rewards": names}}; all but "train" may be left out: no evaluation, weight 1, every reward. Every
record carries its task's name as "task", in place of a "task" of its own in the file; that decides
about its rewards.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from flowgrpo_jax import rewards
from flowgrpo_jax.prompts import load
from flowgrpo_jax.types import Metadata

Tasks = Mapping[str, Mapping[str, Any]]
KEYS = ("train", "test", "weight", "rewards")


def check(
    tasks: Tasks,
    weights: Mapping[str, float],
    evaluated: Collection[str],
    *,
    alternate: bool = False,
) -> None:
    """Raise ValueError for an unknown key or reward, and for a task that cannot be trained.

    A task cannot be trained without a prompt source or without a reward that has a weight.

    Args:
      weights: of the training rewards; evaluated: names of the evaluation's.
      alternate: whether the tasks take turns.
    """
    if alternate and len(tasks) < 2:
        raise ValueError(
            f"prompts.alternate=True: tasks take turns, and prompts.tasks has {len(tasks)}; name at"
            " least two"
        )
    if alternate and not any(float(task.get("weight", 1.0)) for task in tasks.values()):
        raise ValueError(
            "prompts.alternate=True: no task has a turn, for every prompts.tasks.NAME.weight of"
            f" {sorted(tasks)} is 0: set those that are to be drawn above 0"
        )
    known, trained = {*weights, *evaluated}, reward_weights(tasks, weights)
    for name, task in tasks.items():
        if unknown := sorted(set(task) - set(KEYS)):
            raise ValueError(f"prompts.tasks.{name} has {unknown}: choose from {', '.join(KEYS)}")
        if not task.get("train"):
            raise ValueError(f"prompts.tasks.{name} has no train: name a prompt source")
        if unknown := sorted(set(task.get("rewards") or ()) - known):
            raise ValueError(
                f"prompts.tasks.{name}.rewards names {unknown}: give them a weight in"
                f" reward.weights, which has {sorted(weights)}"
            )
        if not any(trained[name].values()):
            raise ValueError(
                f"prompts.tasks.{name} has no reward that trains it: its rewards need a weight in"
                f" reward.weights, which is {dict(weights)}"
            )


def mixture(sources: Mapping[str, str], exclude: Iterable[Metadata] = ()) -> list[Metadata]:
    """The records of several tasks, {task: source}, one after the other.

    Each record carries its "task", and where it has no "tag" the task's name as its tag. A prompt
    that two tasks have is two records, with two rewards.
    """
    exclude = list(exclude)
    return [
        {"tag": task, **record, "task": task}
        for task, source in sources.items()
        for record in load(source, exclude)
    ]


def splits(tasks: Tasks) -> tuple[list[Metadata], list[Metadata]]:
    """(train, test) records; generated training prompts keep clear of every task's test."""
    test = mixture({name: task["test"] for name, task in tasks.items() if task.get("test")})
    return mixture({name: task["train"] for name, task in tasks.items()}, exclude=test), test


def weights(tasks: Tasks) -> dict[str, float]:
    """Return the relative frequency at which each task is drawn."""
    return {name: float(task.get("weight", 1.0)) for name, task in tasks.items()}


def turn(weights: Mapping[str, float], epoch: int) -> dict[str, float]:
    """Return the frequencies of an epoch in which one task alone has its turn, by their names.

    Tasks whose frequency is 0 have none.
    """
    drawn = sorted(name for name, weight in weights.items() if weight > 0)
    return {name: float(name == drawn[epoch % len(drawn)]) for name in weights}


def reward_weights(tasks: Tasks, weights: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """Return {task: {reward: weight}}.

    A reward that no task names belongs to every task. A reward that is another view of a named one
    (`rewards.VIEWS`) belongs to the tasks of that one.
    """
    named = {reward for task in tasks.values() for reward in task.get("rewards") or ()}

    def follows(reward: str) -> str:
        base, _ = rewards.VIEWS.get(reward.partition(":")[0], (reward, {}))
        return reward if reward in named else base

    def applies(reward: str, only: Collection[str]) -> bool:
        return not only or follows(reward) in only or follows(reward) not in named

    return {
        name: {r: weight for r, weight in weights.items() if applies(r, task.get("rewards") or ())}
        for name, task in tasks.items()
    }
