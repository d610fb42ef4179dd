"""What towers see of a picture, against Pillow, transformers and torch."""

import jax
import numpy as np
import pytest
from PIL import Image
from torch_towers import pictures, pil_pixels, tensor_pixels
from tower_scores import IMAGES, SIZE

from flowgrpo_jax.models.towers.preprocess import MEAN, STD, as_pil, as_tensor, down, to_even

SHAPES = [(40, 56), (57, 40), (64, 64), (28, 28), (20, 24), (28, 35), (513, 300)]


def levels(pixels):
    """Normalised pixels back to levels of 0 to 255."""
    return (np.asarray(pixels, np.float64) * STD + MEAN) * 255


@pytest.mark.parametrize("height, width", SHAPES)
def test_as_pil(height, width):
    """The same 8-bit levels as Pillow. Its weights have 22 bits, ours 24 and other roundings: where
    a sum falls on the border between two levels (here less than 1 in 1000), they may differ by 1.
    """
    images = pictures(2, height, width)
    wanted = pil_pixels(images, SIZE).permute(0, 2, 3, 1).numpy()
    for ours in (as_pil(images, SIZE), jax.jit(as_pil, static_argnums=1)(images, SIZE)):
        assert ours.shape == wanted.shape and ours.dtype == np.float32
        off = np.abs(levels(ours) - levels(wanted))
        assert off.max() < 1.01 and (off > 0.01).mean() < 1e-3
        same = off < 0.01
        np.testing.assert_allclose(np.asarray(ours)[same], wanted[same], atol=1e-6)


@pytest.mark.parametrize("height, width", [(28, 31), (28, 30), (33, 28), (28, 35), (40, 57)])
@pytest.mark.parametrize("begin", [down, to_even])
def test_a_crop_begins_where_its_library_has_it(height, width, begin):
    """An odd number of pixels is left of most of these: transformers drops the half, torchvision
    rounds it to the even number, as numpy does."""
    (picture,) = pictures(1, height, width)
    full = [SIZE * side // min(height, width) for side in (width, height)]
    fitted = Image.fromarray(picture).resize(full, Image.Resampling.BICUBIC)
    round_half = np.floor if begin is down else np.rint
    left, top = (int(round_half((side - SIZE) / 2)) for side in full)
    wanted = np.asarray(fitted)[top : top + SIZE, left : left + SIZE]
    np.testing.assert_allclose(levels(as_pil(picture, SIZE, begin)), wanted, atol=1.01)


@pytest.mark.parametrize("height, width", SHAPES)
def test_as_tensor(height, width):
    """Torch's antialiased bilinear resize in float32; both sum up to 40 terms per pass."""
    images = pictures(2, height, width)
    wanted = tensor_pixels(images, SIZE).permute(0, 2, 3, 1).numpy()
    for ours in (as_tensor(images, SIZE), jax.jit(as_tensor, static_argnums=1)(images, SIZE)):
        np.testing.assert_allclose(ours, wanted, atol=1e-5)


def test_numpy_stays_on_the_host_and_leading_axes_are_free():
    assert isinstance(as_pil(IMAGES, SIZE), np.ndarray)
    np.testing.assert_array_equal(as_pil(IMAGES[1], SIZE), as_pil(IMAGES, SIZE)[1])


def test_of_floats_no_level_is_rounded():
    whole, halves = (as_pil(x, SIZE) for x in (IMAGES, IMAGES.astype(np.float32)))
    off = np.abs(levels(whole) - levels(halves))
    assert 0.3 < off.max() < 1.01 and off.mean() < 0.4
    np.testing.assert_array_equal(as_tensor(IMAGES, SIZE), as_tensor(IMAGES * np.float32(1), SIZE))
