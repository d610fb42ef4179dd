"""The colours of a picture of the shapes world, as a smooth function of its pixels.

A pixel belongs to a colour, or to the background, by the softmax of -d^2 / (2 WIDTH^2) over its
distances d in RGB, so that every pixel has a gradient towards every colour. With s_c the share of
colour c in the coloured area A, and N colours in the prompt,

    score = sum over the prompt's colours of sqrt(s_c / N)  x  2 a / (1 + a^2),   a = A / expected A

The sum is the overlap of the shares with equal shares of the prompt's colours (the coefficient of
Bhattacharyya); it is 1 for a prompt that names none. The second factor is 1 for a picture with as
much colour as the prompt's number of objects usually has, and falls to 0 without any and with too
much. Shapes, places and which object has which colour are not looked at: `shapes` judges them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flowgrpo_jax.types import Described, GraphReward, Metadata
from flowgrpo_jax.worlds.shapes.render import BACKGROUND, COLORS, PALETTE

WIDTH = 40.0  # of a colour, in levels of RGB; colours are at least 110 apart
AREA = 0.05  # of a picture: a usual object's coloured area
LEAST = 1e-4  # share of an area below which it counts as none, so that the gradient stays finite
NUMBERS = {"a": 1, "an": 1, "two": 2, "three": 3, "four": 4}
_CENTRES = np.array([BACKGROUND, *(PALETTE[name] for name in COLORS)], np.float32)


def read(prompts: Sequence[str], metadata: Sequence[Metadata]) -> dict[str, np.ndarray]:
    """Return the colours [P, 8] that the words of each prompt name, and its objects' number [P]."""
    words = [prompt.lower().replace(".", " ").replace(",", " ").split() for prompt in prompts]
    named = [[float(color in said) for color in COLORS] for said in words]
    objects = [max(sum(NUMBERS.get(word, 0) for word in said), 1) for said in words]
    return {"colors": np.array(named, np.float32), "objects": np.array(objects, np.float32)}


def score(weights: Any, images: jax.Array, rows: Any) -> jax.Array:
    """Score images [M, H, W, 3], uint8 or f32 from 0 to 255, 0 to 1."""
    squared = jnp.square(images.astype(jnp.float32)[..., None, :] - _CENTRES).sum(-1)
    members = jax.nn.softmax(-squared / (2 * WIDTH**2), axis=-1)
    areas = members.mean((1, 2))[:, 1:]
    total = areas.sum(-1)
    shares = (areas + LEAST * AREA) / (total[:, None] + LEAST)
    named = rows["colors"]
    number = named.sum(-1)
    overlap = (named * jnp.sqrt(shares / jnp.maximum(number, 1)[:, None])).sum(-1)
    amount = total / (AREA * rows["objects"])
    return jnp.where(number > 0, overlap, 1) * 2 * amount / (1 + amount**2)


REWARD = GraphReward({}, read, score, differentiable=True)


def describe(dtype: str) -> Described:
    """Describe the reward, which has no weights and one precision."""
    inputs = {"colors": (len(COLORS),), "objects": ()}
    return Described(
        REWARD, {k: jax.ShapeDtypeStruct(shape, jnp.float32) for k, shape in inputs.items()}
    )


DESCRIBED = {"REWARD": describe}
