"""The shapes world as pretraining sees it.

A share of the captions is wrong in one attribute, so that the pretrained model draws clean shapes
and yet follows prompts imperfectly, which is the state in which online RL meets SD3.5.
"""

import numpy as np

from flowgrpo_jax.worlds.pretraining.world import World
from flowgrpo_jax.worlds.shapes import grammar
from flowgrpo_jax.worlds.shapes.render import render


def captions() -> list[dict]:
    return grammar.prompts("all") + grammar.descriptions()


def picture(metadata: dict, rng: np.random.Generator) -> np.ndarray:
    return render(grammar.sample_scene(metadata, rng))


def true_pictures(n: int) -> list[tuple[np.ndarray, str]]:
    """Rendered pictures of the first n test prompts, with their prompts: `monitor.pictures`."""
    records = grammar.prompts("test")[:n]
    made = [picture(record, np.random.default_rng(i)) for i, record in enumerate(records)]
    return [(made[i], record["prompt"]) for i, record in enumerate(records)]


WORLD = World(
    name="shapes",
    captions=captions,
    picture=picture,
    garble=grammar.garble,
    tag_weights={
        "single_object": 0.5,
        "two_object": 2.5,
        "counting": 1.5,
        "colors": 1.0,
        "position": 3.0,
        "color_attr": 3.0,
        "described": 4.0,
    },
    garbled=0.2,
    length=grammar.LENGTH,
    words=grammar.vocabulary(),
)
