"""Pretraining data of a world: pictures with captions as careless as the web's."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat
from multiprocessing import get_context
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

from flowgrpo_jax.worlds.pretraining.world import World

CHUNK = 1000  # pictures per seed: the data does not depend on the number of workers


class Dataset(NamedTuple):
    images: np.ndarray  # uint8 [n, 64, 64, 3]
    captions: np.ndarray  # i32 [n], index into `caption_table`


def caption_table(world: World) -> list[str]:
    """Every caption of the world, in the order that `Dataset.captions` counts."""
    return [metadata["prompt"] for metadata in world.captions()]


def chunk(world: World, seed: int, number: int) -> tuple[np.ndarray, np.ndarray]:
    """The CHUNK pictures and captions of this seed and number."""
    return draw(world, CHUNK, np.random.default_rng([seed, number]))


def draw(world: World, n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """n pictures and their captions, as `Dataset` has them."""
    everything = world.captions()
    tags = np.array([metadata["tag"] for metadata in everything])
    by_tag = {tag: np.flatnonzero(tags == tag) for tag in world.tag_weights}
    weights = np.array(list(world.tag_weights.values()))
    images, captions = [], []
    for tag in rng.choice(list(by_tag), size=n, p=weights / weights.sum()):
        caption = int(rng.choice(by_tag[tag]))
        metadata = everything[caption]
        shown = world.garble(metadata, rng) if rng.random() < world.garbled else metadata
        images.append(world.picture(shown, rng))
        captions.append(caption)
    return np.stack(images), np.array(captions, np.int32)


def check(pictures: int) -> None:
    """Raise ValueError for a number of pictures that is not a multiple of the chunk size."""
    if pictures < CHUNK or pictures % CHUNK:
        raise ValueError(f"--pictures={pictures}: must be a multiple of {CHUNK}, made at once")


def make(world: World, n: int, seed: int, cache: Path | None = None) -> Dataset:
    """n pictures (a multiple of 1000) and their captions, drawn on all cores; the same for the same
    seed."""
    check(n)
    file = cache / f"pictures-{seed}-{n}.npz" if cache else None
    if file is not None and file.exists():
        with np.load(file) as stored:
            return Dataset(stored["images"], stored["captions"])
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        parts = list(pool.map(chunk, repeat(world), repeat(seed), range(n // CHUNK)))
    data = Dataset(*(np.concatenate(part) for part in zip(*parts)))
    if file is not None:
        write_whole(file, lambda f: np.savez(f, images=data.images, captions=data.captions))
    return data


def write_whole(file: Path, write: Callable[[IO[bytes]], None]) -> None:
    """Write a file in one step: an interrupted process leaves the whole file or none."""
    part = file.with_name(f"{file.name}.part")
    with part.open("wb") as opened:
        write(opened)
    part.replace(file)
