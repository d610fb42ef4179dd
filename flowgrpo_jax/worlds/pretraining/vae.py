"""Pretraining, part one: the autoencoder, trained on pictures of the world."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from flowgrpo_jax.models import layers
from flowgrpo_jax.models.layers import Params
from flowgrpo_jax.models.vae import VAE, VAEConfig

CONFIG = VAEConfig(
    block_out_channels=(16, 16, 32, 64),
    layers_per_block=1,
    norm_num_groups=4,
    scaling_factor=1.0,  # measured after training, see `statistics`
    shift_factor=0.0,
)
# Weight of the mean KL per latent element, beside the picture's mean error per value. Sharp
# pictures first; then the latents are pressed into as little as the pictures need, which makes them
# far easier for the flow to model.
KL_WEIGHT_EARLY, KL_WEIGHT_LATE = 3e-5, 2e-3


def to_float(images: Any) -> jax.Array:
    """uint8 -> [-1, 1]."""
    return jnp.asarray(images, jnp.float32) / 127.5 - 1


def loss(
    apply: Callable[..., Any], params: Params, images: jax.Array, key: jax.Array, kl_weight: Any
):
    """L1 + L2 of the reconstruction, plus the KL of the posterior to N(0, 1)."""
    mean, logvar = apply(params, images, method="encode")
    z = mean + jnp.exp(logvar / 2) * jax.random.normal(key, mean.shape)
    error = apply(params, z, method="decode") - images
    kl = 0.5 * (jnp.square(mean) + jnp.exp(logvar) - 1 - logvar).mean()
    return jnp.abs(error).mean() + jnp.square(error).mean() + kl_weight * kl, (
        jnp.square(error).mean(),
        kl,
    )


def create(rngs: nnx.Rngs) -> VAE:
    return VAE(CONFIG, rngs=rngs)


def optimiser(steps: int) -> optax.GradientTransformation:
    schedule = optax.warmup_cosine_decay_schedule(0.0, 2e-3, min(100, steps // 2), steps, 2e-5)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=1e-5))


def init_params(seed: int) -> Params:
    return layers.initialise(create, seed)


def init(params: Params, steps: int) -> dict[str, Any]:
    """The training state that starts from these weights."""
    return {"params": params, "opt_state": optimiser(steps).init(params), "step": jnp.int32(0)}


def train_step(steps: int) -> Callable[..., Any]:
    apply, _ = layers.functional(nnx.eval_shape(lambda: create(nnx.Rngs(0))))
    tx = optimiser(steps)

    @jax.jit
    def step(state: dict[str, Any], images: jax.Array, key: jax.Array):
        key = jax.random.fold_in(key, state["step"])
        late = state["step"] >= 2 * steps // 3
        weight = jnp.where(late, KL_WEIGHT_LATE, KL_WEIGHT_EARLY)
        grad = jax.value_and_grad(
            lambda p: loss(apply, p, to_float(images), key, weight), has_aux=True
        )
        (_, (mse, kl)), grads = grad(state["params"])
        updates, opt_state = tx.update(grads, state["opt_state"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        return {"params": params, "opt_state": opt_state, "step": state["step"] + 1}, (mse, kl)

    return step


def encode_all(params: Params, images: np.ndarray, batch: int = 250) -> np.ndarray:
    """Posterior means of all pictures, unscaled: f32 [n, 8, 8, 16]."""
    apply, _ = layers.functional(nnx.eval_shape(lambda: create(nnx.Rngs(0))))
    encode = jax.jit(lambda p, x: apply(p, to_float(x), method="encode")[0])
    return np.concatenate(
        [np.asarray(encode(params, images[i : i + batch])) for i in range(0, len(images), batch)]
    )


def statistics(means: np.ndarray) -> tuple[float, float]:
    """(scaling_factor, shift_factor) that give the latents mean 0 and standard deviation 1."""
    return float(1 / means.std()), float(means.mean())
