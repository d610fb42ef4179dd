"""A tiny model with random weights: it compiles in seconds, and has every kind of block."""

import dataclasses

import numpy as np

from flowgrpo_jax.models import layers
from flowgrpo_jax.models.sd3.mmdit import MMDiT, MMDiTConfig
from flowgrpo_jax.models.text import CLIPConfig, T5Config
from flowgrpo_jax.models.vae import VAE, VAEConfig
from flowgrpo_jax.worlds.pretraining import flow, package
from flowgrpo_jax.worlds.pretraining.tokenizers import sizes, write_tokenizers
from flowgrpo_jax.worlds.shapes import grammar

SIZE = 32  # px
MMDIT = MMDiTConfig(
    sample_size=4,
    num_layers=3,
    attention_head_dim=8,
    num_attention_heads=8,
    joint_attention_dim=32,
    caption_projection_dim=64,
    pooled_projection_dim=32,
    pos_embed_max_size=4,
    dual_attention_layers=(0,),
    qk_norm="rms_norm",
)
T5 = T5Config(vocab_size=9, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4)


def draw(shapes, rng):
    """Random weights {path: f32 array}: layers keep the scale of what they are given."""
    return {path: weight(path, x.shape, rng) for path, x in shapes.items()}


def weight(path, shape, rng):
    noise = rng.normal(size=shape)
    if path.endswith("kernel"):
        noise /= np.sqrt(np.prod(shape[-4:-1]) if len(shape) >= 4 else shape[-2])
    elif path.endswith("embedding"):
        noise /= np.sqrt(shape[-1])
    else:
        noise = path.endswith("scale") + 0.1 * noise
    return noise.astype(np.float32)


def clip(vocabulary, activation):
    return CLIPConfig(
        vocab_size=vocabulary,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=grammar.LENGTH,
        hidden_act=activation,
        projection_dim=16,
        eos_token_id=vocabulary - 1,
    )


def write_model(folder):
    """A tiny model with random weights, none of them zero, in diffusers layout."""
    words = grammar.vocabulary()
    write_tokenizers(folder, words, grammar.LENGTH)
    n_clip, n_t5 = sizes(words)
    clips = clip(n_clip, "quick_gelu"), clip(n_clip, "gelu")
    t5 = dataclasses.replace(T5, vocab_size=n_t5)
    vae = VAEConfig(
        block_out_channels=(4, 4, 4, 4),
        layers_per_block=1,
        norm_num_groups=2,
        scaling_factor=1.0,
        shift_factor=0.0,
    )
    makers = flow.makers(*clips, t5) | {
        "transformer": lambda rngs: MMDiT(MMDIT, rngs=rngs),
        "vae": lambda rngs: VAE(vae, rngs=rngs),
    }
    rng = np.random.default_rng(0)
    params = {name: draw(layers.abstract(create)[1], rng) for name, create in makers.items()}
    package.write(folder, params, MMDIT, vae, *clips, t5, dtype=np.float32)
