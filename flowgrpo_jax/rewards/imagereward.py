"""ImageReward-v1.0: a BLIP that reads the prompt while it looks at the image, about -2 to 2.

Source: Xu et al. 2023 (arXiv 2304.05977), `inference_rank` of THUDM/ImageReward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flowgrpo_jax.models.towers.blip import BLIPConfig, ImageReward
from flowgrpo_jax.models.towers.preprocess import as_pil, to_even
from flowgrpo_jax.rewards import towers
from flowgrpo_jax.rewards.towers import IMAGE_REWARD_FILES
from flowgrpo_jax.types import Described, GraphReward, Metadata

LENGTH = 35  # tokens that are read of a prompt


def make(
    path: str = "THUDM/ImageReward",
    dtype: str = "float32",
    tokenizer: str | None = "google-bert/bert-base-uncased",
) -> GraphReward:
    """Make the reward with these weights.

    Args:
      path: a folder, a weight file or a hub id; med_config.json is read where it lies beside.
      dtype: of both encoders; the head is float32.
      tokenizer: where BERT's tokenizer is, when not beside the weights.
    """
    file = towers.find(path, IMAGE_REWARD_FILES, "reward.options.imagereward.path")
    tower = towers.read_image_reward(file, dtype)
    option = "reward.options.imagereward.tokenizer"
    bert = towers.bert_tokenizer(file.parent, tokenizer, option)

    def prepare(prompts: Sequence[str], metadata: Sequence[Metadata]) -> dict[str, np.ndarray]:
        read = bert(list(prompts), padding="max_length", max_length=LENGTH, truncation=True)
        shape = (len(prompts), LENGTH)
        ids, mask = (np.asarray(read[x]).reshape(shape) for x in ("input_ids", "attention_mask"))
        return {"ids": ids.astype(np.int32), "mask": mask.astype(bool)}

    return reading(tower, dtype, prepare)


def reading(
    tower: towers.Tower,
    dtype: str,
    prepare: Callable[[Sequence[str], Sequence[Metadata]], dict[str, np.ndarray]],
) -> GraphReward:
    """The tower's score of images and of their prompts' `ids` and `mask`."""

    def score(weights: Any, images: jax.Array, rows: Any) -> jax.Array:
        pixels = as_pil(images, tower.config.image_size, to_even)
        with towers.precision(dtype):
            return tower.apply(weights, rows["ids"], rows["mask"], pixels)

    return GraphReward(tower.params, prepare, score, differentiable=True)


def describe(dtype: str) -> Described:
    """Describe the reward with the shapes of the published weights."""
    tower = towers.described("imagereward", ImageReward, BLIPConfig(), dtype)
    inputs = {
        "ids": jax.ShapeDtypeStruct((LENGTH,), jnp.int32),
        "mask": jax.ShapeDtypeStruct((LENGTH,), bool),
    }
    return Described(reading(tower, dtype, towers.unprepared), inputs)


DESCRIBED = {"make": describe}
