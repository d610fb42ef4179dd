"""Pictures with captions for a loss on data: of the bundled worlds, or of a folder of one's own.

A source is a pure function of (count, seed, epoch), so that a run that goes on sees what it would
have seen. Its pictures are brought to the run's size: the largest part of the same aspect from the
middle, resized.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from flowgrpo_jax import tables
from flowgrpo_jax.prompts import prompt_file
from flowgrpo_jax.storage import files, pictures
from flowgrpo_jax.worlds.pretraining import data

WORLDS = ("shapes", "signs")
BASE = "base"  # the base model's own samples, for the prompts of the epoch
LISTING = "metadata.jsonl"


class Captioned(NamedTuple):
    """N captions, and a function that reads their pictures, uint8 [N, H, W, 3]."""

    pixels: Callable[[], np.ndarray]
    captions: list[str]


Source = Callable[[int, int, int], Captioned]  # (count, seed, epoch)


@dataclass(frozen=True)
class Data:
    """The settings of a loss on data.

    Attributes:
      source: of the pictures; None for the base model's own samples.
      weight: of the loss beside the algorithm's.
      images: how many pictures an update (or its own step) takes; micro_batch: how many the
        devices handle at once.
      every: epochs from one to the next.
      own_step: whether it has an optimiser step of its own, after the updates of the epoch.
    """

    source: Source | None
    weight: float
    images: int
    micro_batch: int
    every: int
    own_step: bool

    def falls_on(self, epoch: int) -> bool:
        """Whether an epoch, counted from 0, has the loss: every `every`-th one."""
        return (epoch + 1) % self.every == 0

    def steps(self, updates: int) -> int:
        """The optimiser steps of an epoch with so many updates that take pictures each."""
        return 1 if self.own_step else updates


def check(weight: float, images: int, every: int, *, update: int, devices: int) -> None:
    """Raise ValueError for numbers of a loss on data that are out of range.

    Args:
      update: images of an update; devices: the equal parts that the batch is cut into.
    """
    if not weight >= 0:
        raise ValueError(f"data.weight={weight}: must be at least 0, which means no loss on data")
    if not 1 <= images <= update:
        raise ValueError(
            f"data.images={images}: each takes the first noise of another image of the update, so"
            f" choose from 1 to the {update} images of an update"
        )
    if images % devices:
        raise ValueError(
            f"data.images={images} cannot be cut into the {devices} equal parts of mesh.data x"
            f" mesh.fsdp: choose a multiple of {devices}"
        )
    if every < 1:
        raise ValueError(f"data.every={every}: epochs from one to the next, must be at least 1")


def load(source: str, height: int, width: int) -> Source | None:
    """Return a source of pictures of height x width pixels; None for the base's own samples.

    Args:
      source: "base"; "shapes" or "signs", what the model of that world was pretrained on; or a
        folder with pictures: each NAME.png (or .jpg, .webp) with its caption in NAME.txt, or listed
        in metadata.jsonl by "file_name" and "text".

    Raises FileNotFoundError or ValueError that names the file and what it should be.
    """
    if source == BASE:
        return None
    if source in WORLDS:
        world = tables.find({}, f"flowgrpo_jax.worlds.{source}.world:WORLD", "data.source")

        def draw(count: int, seed: int, epoch: int) -> Captioned:
            rng = np.random.default_rng([seed, epoch])
            images, rows = data.draw(world, count, rng)
            captions = data.caption_table(world)
            pixels = partial(fitted, images, height, width)
            return Captioned(pixels, [captions[i] for i in rows])

        return draw
    return partial(_of_folder, list(pairs(Path(source).expanduser())), height, width)


def _of_folder(
    known: list[tuple[Path, str]], height: int, width: int, count: int, seed: int, epoch: int
) -> Captioned:
    """Choose some of a folder's pictures, no one twice while there are enough."""
    rng = np.random.default_rng([seed, epoch])
    rows = rng.choice(len(known), size=count, replace=count > len(known))
    chosen = [known[i] for i in rows]

    def pixels() -> np.ndarray:
        return fitted([pictures.read(file) for file, _ in chosen], height, width)

    return Captioned(pixels, [caption for _, caption in chosen])


def fitted(images: list[np.ndarray] | np.ndarray, height: int, width: int) -> np.ndarray:
    """Return pictures uint8 [h, w, 3] of any size as uint8 [N, height, width, 3]."""
    lanczos = Image.Resampling.LANCZOS
    return np.stack([pictures.fitted(image, height, width, lanczos) for image in images])


def pairs(folder: Path) -> Iterator[tuple[Path, str]]:
    """Yield each picture of a folder with its caption, in the order of their names or of the list.

    Raises FileNotFoundError for a missing folder, picture or caption, and ValueError for what
    cannot be read.
    """
    if not folder.is_dir():
        raise FileNotFoundError(
            f"data.source={str(folder)!r} is no folder: give one with pictures and captions, or"
            f" choose from {', '.join(map(repr, (BASE, *WORLDS)))}"
        )
    listing = folder / LISTING
    found = list(_listed(listing) if listing.is_file() else pictures.with_captions(folder))
    if not found:
        raise FileNotFoundError(
            f"{folder} holds no picture: put NAME.png and NAME.txt into it, or {LISTING} with"
            ' "file_name" and "text"'
        )
    for file, caption in found:
        try:
            pictures.probe(file)
        except OSError as error:
            raise ValueError(
                f"{file} cannot be read as a picture: {error}. Save it again, or remove it"
            ) from error
        yield file, caption


def _listed(listing: Path) -> Iterator[tuple[Path, str]]:
    for number, line in enumerate(files.read_text(listing).split("\n"), 1):
        if not line.strip():
            continue
        record = prompt_file.json_object(listing, number, line, "file_name")
        file, text = (record.get(key) for key in ("file_name", "text"))
        if not isinstance(file, str) or not isinstance(text, str):
            raise ValueError(f'{listing}: line {number} needs texts "file_name" and "text"')
        if not (listing.parent / file).is_file():
            raise FileNotFoundError(
                f"{listing}: line {number}: {file} is not in {listing.parent}: copy it there, or"
                ' correct "file_name"'
            )
        yield listing.parent / file, text
