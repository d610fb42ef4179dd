"""Images as the reward models read them: resized, centre-cropped, normalised.

Resizing is two small matrix products whose weights are computed at trace time, so it runs in the
graph; the same functions take numpy arrays on the host. Two conventions, each that of a reference:

  `as_pil`     Pillow's bicubic on 8-bit images, as transformers' CLIP processor and the transforms
               of open_clip, HPSv2 and ImageReward use it: rounded to whole levels after the
               horizontal and again after the vertical pass.
  `as_tensor`  torchvision's `Resize` on a float tensor (bilinear, antialiased, not rounded), which
               upstream's CLIPScore and image similarity use.

The libraries also differ in where a crop begins that leaves an odd number of pixels: transformers
rounds the half down, torchvision to even. Square images are never cropped.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

# The mean and std of OpenAI's CLIP, which laion, PickScore, HPSv2 and ImageReward use as well.
MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)


def down(left: int) -> int:
    """Return where a centre crop begins that cuts off `left` pixels, rounded as in transformers."""
    return left // 2


def to_even(left: int) -> int:
    """Return where a centre crop begins that cuts off `left` pixels, rounded as in torchvision."""
    return round(left / 2)


def bilinear(x: np.ndarray) -> np.ndarray:
    """The triangle filter."""
    return np.maximum(1 - np.abs(x), 0)


def bicubic(x: np.ndarray, a: float = -0.5) -> np.ndarray:
    """Keys' cubic filter, with the slope of Pillow and of torch's antialiased resizing."""
    x = np.abs(x)
    near = (a + 2) * x**3 - (a + 3) * x**2 + 1
    far = a * (x**3 - 5 * x**2 + 8 * x - 4)
    return np.where(x < 1, near, np.where(x < 2, far, 0))


def matrix(n_in: int, n_out: int, kernel: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Weights f32 [n_out, n_in] of a one-dimensional resize; each row sums to 1.

    Where it shrinks, the filter is stretched over all the pixels that fall into one (antialiasing).
    """
    scale = n_in / n_out
    centres = (np.arange(n_out) + 0.5) * scale
    weights = kernel((np.arange(n_in) + 0.5 - centres[:, None]) / max(scale, 1.0))
    return (weights / weights.sum(1, keepdims=True)).astype(np.float32)


def square(
    height: int,
    width: int,
    size: int,
    kernel: Callable[[np.ndarray], np.ndarray],
    begin: Callable[[int], int],
) -> tuple[np.ndarray, np.ndarray]:
    """Weights [size, height] and [size, width]: the shorter side becomes `size`, centre-cropped."""
    short = min(height, width)

    def cropped(n: int) -> np.ndarray:
        full = int(size * n / short)
        start = begin(full - size)
        return matrix(n, full, kernel)[start : start + size]

    return cropped(height), cropped(width)


def as_pil(images: Any, size: int, begin: Callable[[int], int] = down) -> Any:
    """Images [..., H, W, 3], uint8 or f32 from 0 to 255 -> normalised f32 [..., size, size, 3].

    Of f32 images no level is rounded, so that there is a gradient.

    With `begin=down` as transformers' CLIP processor, with `to_even` as torchvision's transforms.
    Within one level of 255 of Pillow, and equal but where its 22-bit weights round the other way.
    """

    def level(x: Any) -> Any:  # round half up, as Pillow does
        x = x.clip(0, 255)
        return (x + 0.5).astype(np.uint8).astype(np.float32) if whole else x

    whole = images.dtype == np.uint8
    return _normalised(_resized(images, size, bicubic, begin, level))


def as_tensor(images: Any, size: int) -> Any:
    """Resize and normalise images as torchvision resizes float tensors; see `as_pil`."""
    return _normalised(_resized(images, size, bilinear, to_even, lambda x: x))


def _resized(
    images: Any,
    size: int,
    kernel: Callable[[np.ndarray], np.ndarray],
    begin: Callable[[int], int],
    after_each: Callable[[Any], Any],
) -> Any:
    """Resize images [..., H, W, 3] to levels f32 [..., 3, size, size].

    This uses methods and operators only, so that it runs on NumPy and on JAX arrays.
    """
    height, width = images.shape[-3:-1]
    rows, columns = square(height, width, size, kernel, begin)
    x = images.astype(np.float32).swapaxes(-1, -3).swapaxes(-1, -2)  # channels first
    with jax.default_matmul_precision("highest"):
        x = after_each(x @ columns.T)
        return after_each(rows @ x)


def _normalised(x: Any) -> Any:
    """Levels [..., 3, H, W] -> [..., H, W, 3]."""
    x = x.swapaxes(-1, -2).swapaxes(-1, -3)
    return (x / np.float32(255) - MEAN) / STD
