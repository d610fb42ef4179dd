"""Rewards built on CLIP: PickScore, CLIPScore, HPSv2.1, the LAION aesthetic score, similarity.

Scales and preprocessing are those of yifan123/flow_grpo (see each function). Options of all:

  path   a folder, a weight file or a hub id; the published weights by default
  dtype  of the weights and the computation: float32 (default, as upstream), bfloat16, float16

Texts are tokenised on the host, once per prompt; everything else is in the graph.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flowgrpo_jax.models.tokenizers import padded
from flowgrpo_jax.models.towers.aesthetic_head import Head
from flowgrpo_jax.models.towers.clip import CLIP, VIT_H_14, VIT_L_14, DualConfig
from flowgrpo_jax.models.towers.preprocess import as_pil, as_tensor, to_even
from flowgrpo_jax.rewards import towers
from flowgrpo_jax.rewards.towers import CLIP_H, CLIP_L, HEAD_FILES, HPS_FILES, Tower
from flowgrpo_jax.storage import pictures
from flowgrpo_jax.types import Described, GraphReward, Metadata

log = logging.getLogger(__name__)
Prepare = Callable[[Sequence[str], Sequence[Metadata]], dict[str, np.ndarray]]

# How images are read, and how the score is made of cosine and logit.
PICKSCORE: dict[str, Any] = {"preprocess": as_pil, "rule": lambda cosine, logit: logit / 26}
CLIPSCORE: dict[str, Any] = {"preprocess": as_tensor, "rule": lambda cosine, logit: logit / 30}
HPSV2: dict[str, Any] = {
    "preprocess": partial(as_pil, begin=to_even),
    "rule": lambda cosine, logit: cosine,
}


def pickscore(
    path: str = "yuvalkirstain/PickScore_v1",
    dtype: str = "float32",
    tokenizer: str | None = CLIP_H,
) -> GraphReward:
    """logit / 26, about 0.75 to 0.92 (papers report the logit, 21 to 24).

    Args:
      tokenizer: where the tokenizer is, when not beside the weights.
    Source: Kirstain et al. 2023 (arXiv 2305.01569); CLIP ViT-H/14 tuned on human choices.
    """
    tower = towers.clip(path, dtype, "reward.options.pickscore.path")
    texts = _tokenised(tower, tokenizer, "reward.options.pickscore.tokenizer")
    return agreement(tower, dtype, texts, **PICKSCORE)


def clipscore(path: str = CLIP_L, dtype: str = "float32") -> GraphReward:
    """logit / 30 of OpenAI's CLIP ViT-L/14, about 0.8 to 1.1.

    Source: Hessel et al. 2021 (arXiv 2104.08718); scaled and resized as upstream's clip_scorer.
    """
    option = "reward.options.clipscore.path"
    tower = towers.clip(path, dtype, option)
    texts = _tokenised(tower, None, option)
    return agreement(tower, dtype, texts, **CLIPSCORE)


def hpsv2(
    path: str = "xswu/HPSv2", dtype: str = "float32", tokenizer: str | None = CLIP_H
) -> GraphReward:
    """Human preference score v2.1: the cosine, about 0.2 to 0.35.

    Upstream computes it under autocast (half precision, one image at a time); this is float32.
    Without a config.json beside the weights they are taken for ViT-H/14.

    Args:
      tokenizer: where the tokenizer is, when not beside the weights.
    Source: Wu et al. 2023 (arXiv 2306.09341); CLIP ViT-H/14 in open_clip's layout.
    """
    tower = towers.clip(path, dtype, "reward.options.hpsv2.path", HPS_FILES, VIT_H_14)
    texts = _tokenised(tower, tokenizer, "reward.options.hpsv2.tokenizer")
    return agreement(tower, dtype, texts, **HPSV2)


def aesthetic(
    path: str = CLIP_L, head: str = "trl-lib/ddpo-aesthetic-predictor", dtype: str = "float32"
) -> GraphReward:
    """LAION's aesthetic score, about 4 to 7: a head on the L2-normalised image embedding.

    Args:
      head: the head's weights (sac+logos+ava1-l14-linearMSE.pth of improved-aesthetic-predictor).
    """
    tower = towers.clip(path, dtype, "reward.options.aesthetic.path")
    file = towers.find(head, HEAD_FILES, "reward.options.aesthetic.head")
    return beauty(tower, dtype, towers.read_head(file, tower.config.vision.projection_dim))


def beauty(tower: Tower, dtype: str, top: Tower) -> GraphReward:
    """The head's score of what the tower sees."""

    def score(weights: Any, images: jax.Array, rows: Any) -> jax.Array:
        seen = _look(tower, dtype, weights, images, as_pil)
        with towers.precision("float32"):  # the head's, whatever the tower's is
            return top.apply(weights["head"], seen)

    weights = {"clip": tower.params, "head": top.params}
    embed = partial(_look, tower, dtype, preprocess=as_pil)
    return GraphReward(
        weights, lambda prompts, metadata: {}, score, differentiable=True, embed=embed
    )


def image_similarity(
    path: str = CLIP_L, dtype: str = "float32", root: str | None = None
) -> GraphReward:
    """Cosine of the image's and a reference image's CLIP embeddings, at most 1.

    The reference is the file metadata["image"]. A prompt without one is an error when the run
    starts; a prompt whose file cannot be read later has no score.

    Args:
      root: the folder that relative reference paths start from; the working directory without it.
    """
    tower = towers.clip(path, dtype, "reward.options.image_similarity.path")
    size = tower.config.vision.image_size
    folder = Path(root or "").expanduser()

    def prepare(prompts: Sequence[str], metadata: Sequence[Metadata]) -> dict[str, np.ndarray]:
        return {"pixels": np.stack([reference(folder, m, size) for m in metadata])}

    def check(record: Metadata) -> None:
        """Raise ValueError for a record without a picture that can be opened."""
        file = record.get("image")
        if file is None:
            raise ValueError(
                f"the prompt {record.get('prompt')!r} has no reference picture: image_similarity"
                ' needs the path of one under the key "image" of its record'
            )
        try:
            pictures.probe(folder / file)
        except Exception as error:  # Pillow's errors have no common type
            raise ValueError(
                f"the reference picture {file!r} of the prompt {record.get('prompt')!r} cannot be"
                f" read: {error}. Relative paths start from reward.options.image_similarity.root"
            ) from error

    return dataclasses.replace(similarity(tower, dtype, prepare), check=check)


def similarity(tower: Tower, dtype: str, prepare: Prepare) -> GraphReward:
    """The cosine of the tower's embeddings of an image and of `pixels`."""

    def score(weights: Any, images: jax.Array, rows: Any) -> jax.Array:
        ours = _look(tower, dtype, weights, images, as_tensor)
        return jnp.sum(ours * _embed(tower, dtype, weights, rows["pixels"]), axis=-1)

    embed = partial(_look, tower, dtype, preprocess=as_tensor)
    return GraphReward({"clip": tower.params}, prepare, score, differentiable=True, embed=embed)


def reference(folder: Path, metadata: Metadata, size: int) -> np.ndarray:
    """A prompt's reference image as the tower reads it, f32 [size, size, 3]; NaN without one."""
    file = metadata.get("image")
    if file is not None:  # a prompt of another task has none
        try:
            return as_tensor(pictures.read(folder / file), size)
        except Exception:  # whatever a file or a record can hold: it is one prompt's image, no more
            log.warning("reference image %s is not readable", file, exc_info=True)
    return np.full((size, size, 3), np.nan, np.float32)


# ------------------------------------------------------------------------------- common to several


def _tokenised(tower: Tower, fallback: str | None, option: str) -> Prepare:
    """Prompts -> {"ids": i32 [P, L]}, cut and padded to the text tower's length."""
    tokenizer = towers.clip_tokenizer(tower.file.parent, fallback, option)
    length = tower.config.text.max_position_embeddings
    return lambda prompts, metadata: {"ids": padded(tokenizer, list(prompts), length)}


def _unit(x: jax.Array) -> jax.Array:
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def _embed(tower: Tower, dtype: str, weights: Any, pixels: jax.Array) -> jax.Array:
    with towers.precision(dtype):
        return _unit(tower.apply(weights["clip"], pixels, method="embed_image"))


def _look(
    tower: Tower, dtype: str, weights: Any, images: jax.Array, preprocess: Callable[..., jax.Array]
) -> jax.Array:
    """Images uint8 [M, H, W, 3] -> unit embeddings f32 [M, V]."""
    return _embed(tower, dtype, weights, preprocess(images, tower.config.vision.image_size))


def agreement(
    tower: Tower,
    dtype: str,
    prepare: Prepare,
    preprocess: Callable[..., jax.Array],
    rule: Callable[[jax.Array, jax.Array], jax.Array],
) -> GraphReward:
    """Return the score of agreement: rule(cosine f32 [M], logit f32 [M]) -> scores f32 [M]."""

    def score(weights: Any, images: jax.Array, rows: Any) -> jax.Array:
        seen = _look(tower, dtype, weights, images, preprocess)
        with towers.precision(dtype):
            read = _unit(tower.apply(weights["clip"], rows["ids"], method="embed_text"))
        cosine = jnp.sum(seen * read, axis=-1)
        return rule(cosine, cosine * tower.apply(weights["clip"], method="scale"))

    embed = partial(_look, tower, dtype, preprocess=preprocess)
    return GraphReward({"clip": tower.params}, prepare, score, differentiable=True, embed=embed)


# ---------------------------------------------------------------- described, without any weights


def _describe_agreement(
    weights: str, shape: DualConfig, rule: dict[str, Any], dtype: str
) -> Described:
    tower = towers.described(weights, CLIP, shape, dtype)
    ids = jax.ShapeDtypeStruct((shape.text.max_position_embeddings,), jnp.int32)
    return Described(agreement(tower, dtype, towers.unprepared, **rule), {"ids": ids})


def _describe_aesthetic(dtype: str) -> Described:
    tower = towers.described("clip_l", CLIP, VIT_L_14, dtype)
    head = towers.described("head", Head, VIT_L_14.vision.projection_dim, "float32")
    return Described(beauty(tower, dtype, head), {})


def _describe_similarity(dtype: str) -> Described:
    tower = towers.described("clip_l", CLIP, VIT_L_14, dtype)
    side = VIT_L_14.vision.image_size
    pixels = jax.ShapeDtypeStruct((side, side, 3), jnp.float32)
    return Described(similarity(tower, dtype, towers.unprepared), {"pixels": pixels})


DESCRIBED: dict[str, Callable[[str], Described]] = {
    "pickscore": partial(_describe_agreement, "pickscore", VIT_H_14, PICKSCORE),
    "clipscore": partial(_describe_agreement, "clip_l", VIT_L_14, CLIPSCORE),
    "hpsv2": partial(_describe_agreement, "hpsv2", VIT_H_14, HPSV2),
    "aesthetic": _describe_aesthetic,
    "image_similarity": _describe_similarity,
}
