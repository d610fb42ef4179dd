"""The VAE against diffusers' AutoencoderKL, with tiny random weights."""

import jax.numpy as jnp
import numpy as np
import pytest
from torch_models import (
    TOLERANCE,
    VAE as SMALL,
    abstract,
    channels_first,
    channels_last,
    port,
    ported,
    torch,
    torch_vae,
    worst,
)

from flowgrpo_jax.models.vae import VAE, VAEConfig, to_uint8
