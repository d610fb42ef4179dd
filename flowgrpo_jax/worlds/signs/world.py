"""The signs world as pretraining sees it.

Texts of any letters, so that the model learns letters by their place and not words by heart; a
share of the captions is wrong in one letter. The words to train on are a part of the pictures:
prompts then ask for what the model has seen, in the frequencies of English letters.
"""

import numpy as np

from flowgrpo_jax.worlds.pretraining.world import World
from flowgrpo_jax.worlds.signs import grammar
from flowgrpo_jax.worlds.signs.render import render


def picture(record: dict, rng: np.random.Generator) -> np.ndarray:
    return render(grammar.sample_sign(record["text"], rng))


WORLD = World(
    name="signs",
    captions=grammar.captions,
    picture=picture,
    garble=grammar.garble,
    tag_weights={"word": 1.0, "letters": 1.0},
    garbled=0.2,
    length=grammar.LENGTH,
    words=("a", "sign", "that", "says", '"'),
    spelled=[record["text"] for record in grammar.captions()],
)
