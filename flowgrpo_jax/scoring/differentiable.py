"""The rewards in the graph as one differentiable function of latents."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flowgrpo_jax.scoring.scorer import Scorer
from flowgrpo_jax.types import GraphReward

# judge(inputs, latents f32 [M, H, W, C], rows i32 [M]) -> f32 [N, M], for N texts of each prompt
Judge = Callable[[Any, jax.Array, jax.Array], jax.Array]


def check(scorer: Scorer, algorithm: str) -> None:
    """Raise ValueError unless every reward with a weight is differentiable.

    Args:
      algorithm: the row that needs it, for the error.
    """
    for name in scorer.weights.trained:
        reward = scorer.in_graph.rewards.get(name)
        if reward is None or not reward.differentiable:
            problem = "is computed on the host" if reward is None else "has no gradient"
            raise ValueError(
                f"reward.weights.{name}: {algorithm} differentiates the rewards, and this one"
                f" {problem}. Choose from pickscore, clipscore, hpsv2, aesthetic,"
                " image_similarity, imagereward, and shapes_colors for the bundled model; with"
                f" weight 0 {name} is logged all the same"
            )


def judge(
    levels: Callable[[Any, jax.Array], jax.Array] | None, rewards: Mapping[str, GraphReward]
) -> Judge:
    """Return the weighted sum of rewards of decoded latents; `inputs` has its inputs.

    Images are decoded without rounding. A score that is not finite, or that does not apply to the
    prompt, counts as 0, and has no gradient.

    Args:
      levels: `Model.levels`.

    Raises ValueError for a model without it.
    """
    if levels is None:
        raise ValueError(
            "this kind of model has no `levels`, the decoder without rounding that algorithms need"
            " which differentiate the rewards: give the Model one"
        )
    return _judge(levels, tuple((name, reward.score) for name, reward in rewards.items()))


@lru_cache(maxsize=32)  # programs with the same rewards are then the same as well
def _judge(levels: Callable[[Any, jax.Array], jax.Array], scores: tuple[Any, ...]) -> Judge:
    def total(inputs: Any, pixels: jax.Array, prepared: Any, rows: jax.Array) -> jax.Array:
        found = jnp.zeros(pixels.shape[0])
        for name, score in scores:
            mine = jax.tree.map(lambda x: x[rows], prepared[name])
            values = score(inputs["rewards"][name], finite_gradient(pixels), mine)
            found += jnp.where(jnp.isfinite(values), values, 0) * inputs["weights"][name][rows]
        return found

    def judge(inputs: Any, latents: jax.Array, rows: jax.Array) -> jax.Array:
        pixels = levels(inputs["vae"], latents)
        return jnp.stack([total(inputs, pixels, text, rows) for text in inputs["texts"]])

    return judge


def inputs(scorer: Scorer, vae: Any, ids: np.ndarray, texts: Sequence[str]) -> dict[str, Any]:
    """Return the inputs of the judge for P prompts, i32 [P].

    Args:
      vae: the weights of the decoder.
      texts: what the rewards read in place of a prompt, with "{}" for the prompt.
    """
    names, records = scorer.weights.trained, scorer.lookup(ids)
    weights = dict(zip(scorer.weights.names, np.nan_to_num(scorer.weights.table(records))))
    told = [[r | {"prompt": text.format(r["prompt"])} for r in records] for text in texts]
    return {
        "vae": vae,
        "rewards": {name: scorer.in_graph.weights[name] for name in names},
        "weights": {name: weights[name] for name in names},
        "texts": [{name: scorer.in_graph.prepare(t)[name] for name in names} for t in told],
    }


@jax.custom_vjp
def finite_gradient(x: jax.Array) -> jax.Array:
    """Return x [M, ...]. Of an image whose gradient is not finite, the gradient is 0."""
    return x


def _backward(_: None, gradient: jax.Array) -> tuple[jax.Array]:
    axes = tuple(range(1, gradient.ndim))
    finite = jnp.isfinite(gradient).all(axes, keepdims=True)
    return (jnp.where(finite, gradient, 0),)


finite_gradient.defvjp(lambda x: (x, None), _backward)
