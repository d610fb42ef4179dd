"""Pretraining data of the shapes world: pictures with captions as careless as the web's.

A share of the captions is wrong in one attribute, so that the pretrained model draws clean shapes
and yet follows prompts imperfectly, which is the state in which online RL meets SD3.5.
"""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np

from flowgrpo_jax.shapes import grammar, render

# How often each tag is drawn, and the share of captions that garble their picture.
TAG_WEIGHTS = {
    "single_object": 0.5,
    "two_object": 3.0,
    "counting": 1.5,
    "colors": 1.0,
    "position": 4.0,
    "color_attr": 4.0,
}
GARBLED = 0.2
CHUNK = 1000  # pictures per seed: the data does not depend on the number of workers


class Dataset(NamedTuple):
    images: np.ndarray  # uint8 [n, 64, 64, 3]
    captions: np.ndarray  # i32 [n], index into `caption_table`


def caption_table() -> list[str]:
    """Every prompt of the world, in the order that `Dataset.captions` counts."""
    return [metadata["prompt"] for metadata in grammar.prompts("all")]


def _chunk(seed: int, chunk: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng([seed, chunk])
    everything = grammar.prompts("all")
    by_tag = {tag: [i for i, m in enumerate(everything) if m["tag"] == tag] for tag in TAG_WEIGHTS}
    weights = np.array(list(TAG_WEIGHTS.values()))
    images, captions = [], []
    for tag in rng.choice(list(TAG_WEIGHTS), size=CHUNK, p=weights / weights.sum()):
        caption = int(rng.choice(by_tag[tag]))
        metadata = everything[caption]
        shown = grammar.garble(metadata, rng) if rng.random() < GARBLED else metadata
        images.append(render.render(grammar.sample_scene(shown, rng)))
        captions.append(caption)
    return np.stack(images), np.array(captions, np.int32)


def make(n: int, seed: int, cache: Path | None = None, workers: int = 2) -> Dataset:
    """n pictures (a multiple of 1000) and their captions; the same for the same seed."""
    if n % CHUNK:
        raise ValueError(f"n={n} pictures is not a multiple of {CHUNK}: they are made in chunks")
    file = cache / f"pictures-{seed}-{n}.npz" if cache else None
    if file is not None and file.exists():
        with np.load(file) as stored:
            return Dataset(stored["images"], stored["captions"])
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        parts = list(pool.map(_chunk, [seed] * (n // CHUNK), range(n // CHUNK)))
    data = Dataset(*(np.concatenate(part) for part in zip(*parts)))
    if file is not None:
        np.savez(file, images=data.images, captions=data.captions)
    return data
