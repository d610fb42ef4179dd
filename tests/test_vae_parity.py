"""The VAE against diffusers' AutoencoderKL, with tiny random weights."""

import jax
import numpy as np
import pytest
import torch_models
from torch_models import (
    TOLERANCE,
    channels_first,
    channels_last,
    diffusers,
    port,
    ported,
    torch,
    torch_vae,
    worst,
)

from flowgrpo_jax.models.vae import VAE, VAEConfig, to_uint8

SMALL = {**torch_models.VAE, "use_quant_conv": False, "use_post_quant_conv": False}
CASES = {
    "SD3": dict(block_out_channels=(8, 16, 24, 24), layers_per_block=2, latent_channels=16),
    "one level": dict(block_out_channels=(8,)),
    "no attention": dict(
        block_out_channels=(8, 8, 16), mid_block_add_attention=False, shift_factor=None
    ),
    "quant convs": dict(use_quant_conv=True, use_post_quant_conv=True, norm_num_groups=2),
}


def images_for(config):
    """Two random images, 3 latents high and 2 wide."""
    size = (3 * config.downsampling, 2 * config.downsampling)
    return np.random.default_rng(0).uniform(-1, 1, (2, *size, 3)).astype(np.float32)


@pytest.mark.parametrize("case", CASES)
def test_encode_and_decode(case):
    options = {**SMALL, **CASES[case]}
    theirs, config = torch_vae(options), VAEConfig(**options)
    images = images_for(config)
    with torch.no_grad():
        posterior = theirs.encode(channels_first(images)).latent_dist
        wanted = theirs.decode(posterior.mean).sample
    apply, params = port(VAE, config, theirs)
    mean, logvar = jax.jit(lambda x: apply(params, x, method="encode"))(images)
    assert mean.shape == (2, 3, 2, config.latent_channels)
    assert worst(mean, channels_last(posterior.mean)) <= TOLERANCE
    assert worst(logvar, channels_last(posterior.logvar)) <= TOLERANCE
    latents = apply(params, mean, method="scale")
    decoded = jax.jit(lambda z: apply(params, z, method="decode"))(latents)
    assert worst(decoded, channels_last(wanted)) <= TOLERANCE


@pytest.mark.parametrize("shift", [0.0609, None])
def test_latents_are_scaled_and_shifted(shift):
    """decode takes what the pipeline has after its last step."""
    options = {**SMALL, "block_out_channels": (8,), "shift_factor": shift}
    theirs = torch_vae(options)
    latents = np.random.default_rng(0).normal(size=(2, 3, 5, 4)).astype(np.float32)
    with torch.no_grad():
        z = channels_first(latents) / theirs.config.scaling_factor
        wanted = theirs.decode(z + (shift or 0)).sample
    images = ported(VAE, VAEConfig(**options), theirs, method="decode")(latents)
    assert worst(images, channels_last(wanted)) <= TOLERANCE


def test_logvar_is_limited():
    options = {**SMALL, "block_out_channels": (8,)}
    theirs, config = torch_vae(options), VAEConfig(**options)
    theirs.encoder.conv_out.weight.data *= 100
    images = images_for(config)
    with torch.no_grad():
        wanted = theirs.encode(channels_first(images)).latent_dist.logvar
    assert wanted.min() == -30 and wanted.max() == 20
    logvar = ported(VAE, config, theirs, method="encode")(images)[1]
    assert worst(logvar, channels_last(wanted)) <= TOLERANCE


def test_activations_far_from_zero():
    """A mean far above the spread, where E[x^2] - E[x]^2 has no digits left. Truth is float64."""
    theirs = torch_vae(SMALL)
    theirs.decoder.conv_in.bias.data += 100
    z = torch.randn(2, 4, 4, 6)
    latents = channels_last((z - SMALL["shift_factor"]) * SMALL["scaling_factor"]).numpy()
    images = ported(VAE, VAEConfig(**SMALL), theirs, method="decode")(latents)
    with torch.no_grad():
        single = theirs.decode(z).sample
        exact = theirs.double().decode(z.double()).sample
    assert worst(images, channels_last(exact)) <= 3 * worst(single, exact)


def test_to_uint8():
    """At every border between two levels, just beside it, and beyond both ends."""
    borders = (np.arange(-9, 521) / 255 - 1).astype(np.float32)
    values = np.concatenate([np.nextafter(borders, -2), borders, np.nextafter(borders, 2)])
    images = values.reshape(1, 53, 10, 3)
    processor = diffusers.image_processor.VaeImageProcessor()
    wanted = processor.postprocess(channels_first(images), output_type="pil")[0]
    ours = jax.jit(to_uint8)(images)
    assert ours.dtype == np.uint8 and len(np.unique(ours)) == 256
    np.testing.assert_array_equal(ours[0], np.asarray(wanted))
