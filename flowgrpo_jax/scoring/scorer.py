"""The rewards of a prompt source: which of them score a prompt, and where they run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from flowgrpo_jax import sharding
from flowgrpo_jax.scoring import graph, host
from flowgrpo_jax.scoring.reward_weights import RewardWeights
from flowgrpo_jax.types import GraphReward, Metadata, NamedScores, Reward, scope_of

Loaded = Mapping[str, Reward | GraphReward]  # by name


class Scorer:
    """The rewards of a prompt source, by the place where they run.

    Attributes:
      weights: the rewards' weights, and which of them apply to a prompt.
      in_graph: the rewards on the devices.
      image_rewards: names of the host's rewards that judge each image by itself.
      joint_rewards: {name: "group" or "epoch"} of the host's rewards that are given all images of a
        prompt or of an epoch in one call.
    """

    def __init__(
        self,
        weights: RewardWeights,
        rewards: Loaded,
        records: Sequence[Metadata],
        mesh: Mesh,
        *,
        threads: int = 1,
        place: Callable[[Any], Any] = lambda weights: weights,
    ):
        """
        Args:
          rewards: at least those that `weights` names.
          records: the prompts of the source, with their metadata.
          threads: how many call the host's rewards.
          place: puts the weights of rewards onto the devices.
        """
        self.weights, self.records, self.mesh, self.threads = weights, records, mesh, threads
        in_graph: dict[str, GraphReward] = {}
        self._on_host: dict[str, Reward] = {}
        for name in weights.names:
            reward = rewards[name]
            if isinstance(reward, GraphReward):
                in_graph[name] = reward
            else:
                self._on_host[name] = reward
        self.in_graph = graph.GraphRewards(in_graph, place)
        scopes = {name: scope_of(reward) for name, reward in self._on_host.items()}
        self.image_rewards = tuple(name for name, scope in scopes.items() if scope == "image")
        self.joint_rewards = {name: scope for name, scope in scopes.items() if scope != "image"}

    @property
    def trained(self) -> dict[str, GraphReward]:
        """The rewards in the graph that have a weight."""
        return {n: r for n, r in self.in_graph.rewards.items() if n in self.weights.trained}

    def lookup(self, ids: Iterable[int]) -> list[Metadata]:
        """Return the metadata of prompts, by their numbers in the source."""
        return [self.records[i] for i in ids]

    def prepare(self, ids: np.ndarray) -> dict[str, Any]:
        """Prepare the inputs of the rewards in the graph for P prompts, i32 [P]."""
        return self.in_graph.prepare(self.lookup(ids))

    def on_host(self, names: Iterable[str]) -> host.Score:
        """Return some of the host's rewards as one function of images and prompt ids."""
        rewards = {name: self._on_host[name] for name in names}
        return host.composite(rewards, self.lookup, self.weights.applies)

    def inside_program(self) -> Callable[[jax.Array, jax.Array], NamedScores] | None:
        """Return the host's image rewards as a part of the sampling program; None without any.

        Raises ValueError on a mesh on which several devices hold the same image.
        """
        if not self.image_rewards:
            return None
        if (heads := sharding.head_shards(self.mesh)) > 1:
            raise ValueError(
                f"reward.host_call='callback' with mesh.tensor={heads}: every image would be scored"
                " that often; use 'overlap'"
            )
        score = self.on_host(self.image_rewards)
        return host.callback(score, self.image_rewards, self.mesh, sharding.ROWS)


class Source(NamedTuple):
    """Prompts to be scored."""

    weights: RewardWeights
    records: Sequence[Metadata]
    place: Callable[[Metadata], str]  # says where a record is, for errors about it


def scorers(
    rewards: Loaded,
    sources: Iterable[Source],
    mesh: Mesh,
    *,
    timeout: float | None,
    threads: int,
) -> list[Scorer]:
    """Make a scorer for each source. They share the rewards and their arrays on the devices.

    Args:
      timeout: seconds that a call of a reward on the host may take; None: any time.
      threads: how many call the host's rewards.

    Raises ValueError for prompts that a reward cannot judge, and what a reward's `ready` raises.
    """
    for reward in rewards.values():
        getattr(reward, "ready", lambda: None)()  # a remote one raises where nobody answers
    sources = list(sources)
    for source in sources:
        check_records(rewards, source)
    limited: Loaded = {
        name: reward if isinstance(reward, GraphReward) else host.Limited(reward, timeout)
        for name, reward in rewards.items()
    }
    place = graph.place_once(lambda array: sharding.replicate(mesh, array))
    return [
        Scorer(source.weights, limited, source.records, mesh, threads=threads, place=place)
        for source in sources
    ]


def check_records(rewards: Loaded, source: Source) -> None:
    """Let rewards say which of the prompts that they are for they cannot judge.

    Raises ValueError that names the prompt's place.
    """
    for name in source.weights.names:
        check = getattr(rewards[name], "check", None)
        for record in source.records:
            if check is not None and source.weights.applies(name, record):
                try:
                    check(record)
                except ValueError as error:
                    where = source.place(record)
                    raise ValueError(f"{where}: reward {name!r}: {error}") from error
