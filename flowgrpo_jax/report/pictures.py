"""Pictures of a run on disk, for its page: sheets of small pictures with their scores.

A sheet is two files in the folder `report` of the work directory, which also suits a bucket:
`NAME.webp`, the pictures in rows of COLUMNS, and `NAME.json`, what is known about each. NAME is the
kind and the epoch: evaluation-00025, extremes-00025 (the worst and the best of an evaluation) and
training-00025. A sheet has at most MOST pictures of at most SIDE px.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from PIL import Image

from flowgrpo_jax.scoring.scores import Scores
from flowgrpo_jax.storage import files, logs
from flowgrpo_jax.types import PromptBatch

FOLDER = "report"
SIDE = 256  # px, of the longer side of a picture
MOST = 48  # pictures of a sheet
COLUMNS = 6
EXTREMES = 6  # as many of the worst, and of the best
QUALITY = 88  # of WebP, up to 100
SMALL = 96  # px, up to which pictures are kept without loss


def save_evaluation(
    workdir: epath.Path,
    epoch: int,
    pixels: np.ndarray,
    batch: PromptBatch,
    scores: Scores,
    n: int,
) -> None:
    """Save the first `n` pictures of an evaluation, uint8 [B, H, W, 3], and the worst and best."""
    if jax.process_index() > 0:
        return
    total = totals(scores)

    def save(kind: str, rows: np.ndarray) -> None:
        about = [_about(batch, i, scores, i, {"total": float(total[i])}) for i in rows]
        save_sheet(workdir / FOLDER, *_of_epoch(kind, epoch), pixels[rows], about)

    save("evaluation", np.arange(min(n, MOST, len(pixels))))
    ranked = np.argsort(total, kind="stable")
    ranked = ranked[~np.isnan(total[ranked])]
    few = min(EXTREMES, len(ranked) // 2)
    if few:
        save("extremes", np.concatenate([ranked[:few], ranked[::-1][:few]]))


def save_training(
    workdir: epath.Path,
    epoch: int,
    batch: PromptBatch,
    group_size: int,
    scores: Scores,
    advantage: np.ndarray,
) -> None:
    """Save the sample of an epoch's training pictures. Advantage: f32 [W, B], averaged over W."""
    if jax.process_index() > 0 or scores.sample is None or not len(scores.sample.rows):
        return
    total, mean = totals(scores), advantage.mean(axis=0)
    about = []
    for i in scores.sample.rows:
        said = {"total": float(total[i])}
        if np.isfinite(mean[i]):  # it is -inf without a score, where weights are exp(advantage)
            said["advantage"] = float(mean[i])
        about.append(_about(batch, i // group_size, scores, i, said))
    save_sheet(workdir / FOLDER, *_of_epoch("training", epoch), scores.sample.pixels, about)


def totals(scores: Scores) -> np.ndarray:
    """The weighted sum of each picture's rewards, f32 [B]; NaN where one of weight is missing.

    Where none of them is trained on, the first one's score stands for it.
    """
    weights = np.nan_to_num(scores.weights)
    if not weights.any():
        return scores.values[0] if len(scores.values) else np.zeros(len(scores.finite))
    return np.where(weights != 0, scores.values * weights, 0).sum(axis=0)


def _about(
    batch: PromptBatch, prompt: int, scores: Scores, image: int, said: Mapping[str, float]
) -> dict[str, Any]:
    """Return an image's prompt, its scores, and the entries of `said`."""
    given = {name: float(values[image]) for name, values in zip(scores.names, scores.values)}
    given = {name: score for name, score in given.items() if np.isfinite(score)}
    tag = batch.metadata[prompt].get("tag", "")
    return {"prompt": batch.prompts[prompt], "tag": tag, "scores": given, **said}


def save_sheet(
    folder: epath.Path,
    name: str,
    head: Mapping[str, Any],
    pixels: np.ndarray,
    about: Sequence[Mapping[str, Any]],
) -> None:
    """Write the sheet of pictures, uint8 [n, H, W, 3], with `head` and what is `about` each."""
    folder.mkdir(parents=True, exist_ok=True)
    small = [shrink(picture) for picture in pixels[:MOST]]
    width, height = small[0].size
    sheet = Image.new("RGB", (width * COLUMNS, height * -(-len(small) // COLUMNS)))
    for i, picture in enumerate(small):
        sheet.paste(picture, (i % COLUMNS * width, i // COLUMNS * height))
    encoded = io.BytesIO()
    sheet.save(encoded, format="WEBP", quality=QUALITY, lossless=max(width, height) <= SMALL)
    (folder / f"{name}.webp").write_bytes(encoded.getvalue())
    shape = {"columns": COLUMNS, "width": width, "height": height}
    said = [logs.plain(entry) for entry in about[:MOST]]
    written = json.dumps({**head, **shape, "pictures": said})
    files.replace(folder / f"{name}.json", written)  # now the sheet is there


def _of_epoch(kind: str, epoch: int) -> tuple[str, dict[str, Any]]:
    """The name and the head of an epoch's sheet."""
    return f"{kind}-{epoch:05d}", {"kind": kind, "epoch": epoch}


def shrink(picture: np.ndarray) -> Image.Image:
    """A picture, uint8 [H, W, 3], its longer side SIDE px or less."""
    image = Image.fromarray(np.asarray(picture))
    longer = max(image.size)
    if longer <= SIDE:
        return image
    size = [max(1, round(SIDE * length / longer)) for length in image.size]
    return image.resize((size[0], size[1]), Image.Resampling.LANCZOS)
