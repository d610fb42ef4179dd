"""Random factors of an adapter on a small transformer."""

import jax.numpy as jnp
import numpy as np
from flax import nnx

from flowgrpo_jax.models import lora
from flowgrpo_jax.models.layers import functional
from flowgrpo_jax.models.sd3.mmdit import MMDiT, MMDiTConfig

SMALL = MMDiTConfig(
    num_layers=3,
    num_attention_heads=2,
    attention_head_dim=8,
    caption_projection_dim=16,
    joint_attention_dim=20,
    pooled_projection_dim=12,
    pos_embed_max_size=3,
)


def shapes_of(spec, config=SMALL):
    """Shapes of the adapter, and of the model without it."""
    module = nnx.eval_shape(lambda: MMDiT(config, rngs=nnx.Rngs(0)))
    lora.add(module, spec)
    return lora.split(functional(module)[1])


def random_factors(shapes, seed=0):
    rng = np.random.default_rng(seed)
    return {k: jnp.asarray(0.5 * rng.normal(size=v.shape), jnp.float32) for k, v in shapes.items()}
