"""The weights of the rewards, and the choice of the rewards that apply to a prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from flowgrpo_jax.types import Metadata


@dataclass(frozen=True)
class RewardWeights:
    """The weight of each reward; if the prompts are of several tasks, the weights of each task.

    A reward of weight 0 is scored and logged, but never trained on.
    """

    weights: Mapping[str, float]  # of prompts without a task, or with one that `tasks` lacks
    tasks: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        """Return the names of the rewards that may apply to some prompt."""
        return tuple(dict.fromkeys(n for w in (self.weights, *self.tasks.values()) for n in w))

    @property
    def trained(self) -> tuple[str, ...]:
        """Return the names of the rewards that have a weight for some prompt."""
        every = (self.weights, *self.tasks.values())
        return tuple(name for name in self.names if any(w.get(name) for w in every))

    def of(self, metadata: Metadata) -> Mapping[str, float]:
        # Without tasks a record's own "task" says nothing, and may be anything.
        return (
            self.tasks.get(metadata.get("task", ""), self.weights) if self.tasks else self.weights
        )

    def applies(self, name: str, metadata: Metadata) -> bool:
        return name in self.of(metadata)

    def table(self, metadata: Sequence[Metadata]) -> np.ndarray:
        """Return the weights f32 [rewards, prompts], in the order of `names`; NaN: not applied."""
        rows = [[self.of(m).get(name, np.nan) for m in metadata] for name in self.names]
        return np.array(rows, np.float32).reshape(len(self.names), len(metadata))
