"""Advantages that favour good images unlike the others of their group, by features of them."""

import jax.numpy as jnp
import numpy as np
import pytest
from scipy.spatial.distance import cdist

from flowgrpo_jax.advantages import diversity


def test_good_images_unlike_the_others_count_more():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(6, 2, 5)).astype(np.float32)
    advantage = jnp.array([1.0, 2.0, -3.0, 4.0, -5.0, 0.0])
    wanted = np.array(advantage)
    for group in (slice(0, 3), slice(3, 6)):
        flat = features[group].reshape(3, -1)
        distance = cdist(flat, flat, "cosine") + 9 * np.eye(3)
        factor = distance.min(1) / distance.min(1).mean()
        wanted[group] = np.where(wanted[group] > 0, wanted[group] * factor, wanted[group])
    found = diversity.favour(advantage, features, group_size=3, clip=4.5)
    np.testing.assert_allclose(found, np.clip(wanted, -4.5, 4.5), rtol=1e-4)


def test_a_group_of_equal_images_keeps_its_advantages():
    features = np.ones((4, 3), np.float32)
    features[3] = np.nan  # an image that is not finite
    features[2] = 1.0
    advantage = jnp.array([1.0, -1.0, 1.0, 0.0])
    same_group = diversity.favour(advantage[:3], features[:3], group_size=3, clip=5.0)
    np.testing.assert_allclose(same_group, advantage[:3])
    assert np.isfinite(diversity.favour(advantage, features, group_size=4, clip=5.0)).all()


def test_a_broken_image_is_no_neighbour():
    """The other images of its group count as if it were not there."""
    features = np.random.default_rng(1).normal(size=(4, 5)).astype(np.float32)
    features[2, 1] = np.nan
    advantage = jnp.array([1.0, 2.0, 3.0, 0.5])
    found = diversity.favour(advantage, features, group_size=4, clip=50.0)
    others = jnp.array([0, 1, 3])
    alone = diversity.favour(advantage[others], features[others], group_size=3, clip=50.0)
    np.testing.assert_allclose(found[others], alone, rtol=1e-5)
    assert found[2] == 3.0
    lone = np.array([[1.0, 2.0], [np.inf, 0.0]], np.float32)
    kept = diversity.favour(advantage[:2], lone, group_size=2, clip=5.0)
    np.testing.assert_array_equal(kept, advantage[:2])


def test_features_are_latents_pixels_or_ones_own():
    pixels = np.full((2, 4, 4, 3), 255, np.uint8)
    np.testing.assert_array_equal(diversity.load("pixels")((), pixels), np.ones((2, 4, 4, 3)))
    own = diversity.load("test_diversity:brightness")
    np.testing.assert_array_equal(own((), pixels), [[255.0], [255.0]])
    assert [diversity.needs_pixels(n) for n in ("", "latents", "pixels")] == [False, False, True]
    with pytest.raises(ValueError, match=r"advantage\.diversity='dino': choose from 'latents'"):
        diversity.load("dino")


def brightness(pixels):
    return pixels.mean((1, 2, 3))[:, None]
