"""Scores of rewards in the graph, which are made from tiny random checkpoints on disk."""

import jax
import jax.numpy as jnp
import numpy as np
from torch_models import PROMPTS, WORDS, torch
from torch_towers import VISION, pictures, torch_dual

from flowgrpo_jax import rewards
from flowgrpo_jax.types import GraphReward
from flowgrpo_jax.worlds.pretraining.tokenizers import END, clip_merges, write_clip
from flowgrpo_jax.worlds.shapes.grammar import LENGTH

IMAGES = pictures(3)
SIZE = VISION["image_size"]


def write_clip_folder(folder):
    """A CLIP as transformers writes it, with a real tokenizer."""
    torch_dual("quick_gelu").save_pretrained(folder)
    write_clip(folder, clip_merges(WORDS), LENGTH, pad=END)


def make(name, **options) -> GraphReward:
    options = {key: str(value) for key, value in options.items()}
    reward = rewards.load([name], {name: options})[name]
    assert isinstance(reward, GraphReward)
    return reward


# One pixel may be one level off (test_as_pil), which moves a score of these small towers by 2e-5.
PIXEL = dict(rtol=1e-4, atol=1e-4)


def scored(reward, images=IMAGES, prompts=PROMPTS, metadata=None):
    rows = reward.prepare(prompts, metadata or [{}] * len(prompts))
    assert all(len(x) == len(prompts) for x in jax.tree.leaves(rows))
    scores = jax.jit(reward.score)(reward.weights, jnp.asarray(images), rows)
    assert scores.shape == (len(images),) and scores.dtype == jnp.float32
    return np.asarray(scores)


def torch_looks(folder, pixels):
    """transformers' unit image embeddings."""
    from transformers import CLIPModel

    model = CLIPModel.from_pretrained(folder).eval()
    with torch.no_grad():
        x = model.visual_projection(model.vision_model(pixels).pooler_output)
    return x / x.norm(dim=-1, keepdim=True)
