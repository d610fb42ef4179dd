"""SRPO: Direct-Align, and a reward that is a contrast of two texts.

Source: SRPO (arXiv 2509.06942), as its code for FLUX.1 has it (fastvideo/SRPO.py).

Direct-Align knows the noise e that an image x_0 was drawn from, and so can make its latents at any
level and go back from there in one step. At a level s it recovers an image from a neighbouring one
u, where the policy's velocity v is the only thing that has a gradient:

    x     = u e + (1 - u) x_0
    x_hat = (x + (s - u) v(x, u) - s e) / (1 - s)

x_hat is x_0 where v is e - x_0. Coming from more noise (u above s) the gradient leads to images of
a higher reward; coming from less (u below s, "inversion") it leads away from those of a lower one.
The reward reads the prompt behind a good word, and behind a bad one,

    loss = max(threshold - ((1 + k) reward(good. prompt) - reward(bad. prompt)), 0)

with good and bad exchanged in the inversion. k goes from 0.1 to 0.25 with the noise, and from 0.3
to 0.01 in the inversion. For a reward that is linear in the text's embedding, such as hpsv2,
clipscore and pickscore, this is the paper's image x ((1 + k) good - bad).

Deviations: the levels are those of the rollout's schedule, u is the next one to s, and each image
draws s for itself from one of `levels` equal parts of them; theirs lie evenly between two levels,
one for all images, with a jump between u and s of its own size. One pair of words takes the place
of lists that are gone through step by step. The threshold of 0.7 for HPSv2, which the contrast
hardly reaches, is inf here.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from flowgrpo_jax.algorithms import Algorithm, Score, Setup, Velocities, options
from flowgrpo_jax.algorithms.renoise import spread, stratum
from flowgrpo_jax.algorithms.reward_gradients import algorithm
from flowgrpo_jax.types import Rollout

DENOISING = (0.1, 0.25)  # k from little to much noise
INVERSION = (0.3, 0.01)


def make(
    good: str = "Natural-lighting",
    bad: str = "Painting",
    levels: int = 2,
    inversion: bool = True,
    threshold: float = jnp.inf,
) -> Algorithm:
    """
    Args:
      good, bad: the words in front of the prompt, which the reward has to know.
      levels: draws of a level for each image and direction.
      inversion: whether steps to more noise are trained as well.
      threshold: contrast from which on nothing is learned; inf means none.
    """
    options.at_least(1, levels=levels)
    for name, word in {"good": good, "bad": bad}.items():
        if not word.strip():
            raise ValueError(f"algorithm.options.{name}={word!r}: must be a word or more")
    if good == bad:
        raise ValueError(f"algorithm.options.good={good!r}: must differ from bad")

    def rewarded(
        setup: Setup, v: Velocities, rollout: Rollout, term: jax.Array, score: Score
    ) -> jax.Array:
        sigmas, steps = jnp.asarray(setup.process.sigmas, jnp.float32), setup.process.steps
        inverse = term >= levels
        step = stratum(rollout, term % levels, levels, 1, steps - 1)
        begin = sigmas[jnp.where(inverse, step + 1, step - 1)]
        x_hat = recovered(v, rollout, begin, sigmas[step])
        noise = 1 - step / steps
        k = jnp.where(inverse, between(INVERSION, noise), between(DENOISING, noise))
        liked, disliked = score(x_hat)
        contrast = (1 + k) * liked - disliked
        swapped = (1 + k) * disliked - liked
        return jnp.where(inverse, swapped, contrast)

    def terms(setup: Setup, key: jax.Array) -> jax.Array:
        if setup.process.steps - 2 < levels:
            raise ValueError(
                f"algorithm.options.levels={levels}: sample.steps={setup.process.steps} leave"
                f" {setup.process.steps - 2} levels between the first and the last two; choose"
                " fewer levels or more steps"
            )
        return jnp.arange(2 * levels if inversion else levels)

    return algorithm(
        rewarded,
        terms,
        threshold,
        f"SRPO, {good!r} over {bad!r}",
        texts=tuple(f"{escaped(word)}. {{}}" for word in (good, bad)),
    )


def recovered(v: Velocities, rollout: Rollout, begin: jax.Array, end: jax.Array) -> jax.Array:
    """Return the images x_hat that one step recovers.

    Args:
      begin, end: the levels u and s, f32 [M].
    """
    noise, x_0 = rollout.x[0], rollout.latents
    u, s = spread(begin, x_0), spread(end, x_0)
    x = u * noise + (1 - u) * x_0
    return (x + (s - u) * v["policy"](x, begin) - s * noise) / (1 - s)


def between(ends: tuple[float, float], share: jax.Array) -> jax.Array:
    return ends[0] + share * (ends[1] - ends[0])


def escaped(word: str) -> str:
    """Return a word that stands for itself in a template."""
    return word.replace("{", "{{").replace("}", "}}")
