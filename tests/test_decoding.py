"""Decoding a few images at a time: the same pictures in the same order, with less memory."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowgrpo_jax import sharding
from flowgrpo_jax.models import decoding, layers
from flowgrpo_jax.models.vae import VAE, VAEConfig, to_pictures
from flowgrpo_jax.types import Pictures

LATENT = (16, 16, 4)


@pytest.fixture(scope="module")
def decoder():
    config = VAEConfig(block_out_channels=(16, 16), latent_channels=4, norm_num_groups=4)
    vae, shapes = layers.abstract(lambda rngs: VAE(config, rngs=rngs))
    rng = np.random.default_rng(0)
    weights = {
        path: jnp.asarray(rng.normal(scale=0.1, size=x.shape), jnp.float32)
        for path, x in shapes.items()
    }
    return lambda weights, z: to_pictures(vae(weights, z, method="decode")), weights


@pytest.mark.parametrize("at_once, parts", [(1, 6), (2, 3), (4, 2), (6, 1), (100, 1)])
def test_the_pictures_are_those_of_all_at_once(decoder, at_once, parts):
    """Of 6 images: 4 do not divide them, and 3 at once are the most below."""
    decode, weights = decoder
    z = jnp.asarray(np.random.default_rng(1).normal(size=(6, *LATENT)), jnp.float32)
    z = z.at[4].set(jnp.nan)
    seen = []

    def counted(weights, z):
        seen.append(len(z))
        return decode(weights, z)

    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    found = jax.jit(decoding.in_parts(counted, mesh, at_once))(weights, z)
    wanted = jax.jit(decode)(weights, z)
    assert seen == [6 // parts]
    np.testing.assert_array_equal(found.finite, [True] * 4 + [False, True])
    gap = np.abs(found.pixels.astype(int) - wanted.pixels.astype(int))
    assert gap.max() <= 1 and np.asarray(wanted.pixels).std() > 10


def test_one_at_a_time_takes_less_memory(decoder):
    decode, weights = decoder
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    z = jax.ShapeDtypeStruct((8, *LATENT), jnp.float32)

    def temporaries(at_once):
        run = jax.jit(decoding.in_parts(decode, mesh, at_once))
        return run.lower(weights, z).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(1) < temporaries(8) / 4


@pytest.mark.parametrize("size, images", [((512, 512), 1), ((64, 64), 64), ((1024, 768), 1)])
def test_as_many_as_have_the_pixels_of_one_of_512_px(size, images):
    assert decoding.automatic(*size) == images


def test_programs_share_the_function():
    """They are cached by it."""
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    assert decoding.in_parts(Pictures, mesh, 1) is decoding.in_parts(Pictures, mesh, 1)


def test_every_device_decodes_its_own_images():
    """On 4 devices the compiled program moves nothing between them, and keeps the order."""
    code = """
import jax, jax.numpy as jnp, numpy as np
jax.config.update("jax_num_cpu_devices", 4)
from flowgrpo_jax import sharding
from flowgrpo_jax.models import decoding
from flowgrpo_jax.types import Pictures
mesh = sharding.make_mesh(2, 2, 1)
def decode(weights, z):
    assert len(z) == 2, z.shape  # on each of four devices
    return Pictures((z[:, :, :, :3] * weights).astype(jnp.uint8), z.max((1, 2, 3)) < 99)
z = np.arange(24, dtype=np.float32)[:, None, None, None] * np.ones((1, 2, 2, 4), np.float32)
run = jax.jit(decoding.in_parts(decode, mesh, 2))
given = jnp.float32(2.0), sharding.split_rows(mesh, z)
text = run.lower(*given).compile().as_text()
found = run(*given)
np.testing.assert_array_equal(found.pixels[:, 0, 0, 0], 2 * np.arange(24))
assert found.finite.shape == (24,) and found.finite.all()
print([kind for kind in ("all-gather", "all-to-all", "collective-permute") if kind in text])
print({shard.data.shape for shard in found.pixels.addressable_shards})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["[]", "{(6, 2, 2, 3)}"]
