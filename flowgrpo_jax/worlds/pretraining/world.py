"""The record that describes a world to pretraining: its captions and its pictures."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from flowgrpo_jax.types import Metadata


@dataclass(frozen=True)
class World:
    """A world. Its functions are found by name in other processes, which draw the pictures.

    captions() -> all records that a picture may be captioned with, each with its "prompt" and
      "tag", in a fixed order
    picture(record, rng) -> a random picture that shows what the record says, uint8 [64, 64, 3]
    garble(record, rng) -> the record of a picture that careless captioners describe as `record`
    """

    name: str  # of its package in flowgrpo_jax
    captions: Callable[[], list[Metadata]]
    picture: Callable[[Metadata, np.random.Generator], np.ndarray]
    garble: Callable[[Metadata, np.random.Generator], Metadata]
    tag_weights: Mapping[str, float]  # how often each tag is drawn
    garbled: float  # share of captions that garble their picture
    length: int  # tokens of the longest prompt, start and end included
    words: Sequence[str]  # what is one token
    spelled: Sequence[str] = ()  # texts of which every letter is one token
