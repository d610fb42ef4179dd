"""JPEG (in)compressibility: the size of the picture as a JPEG of quality 95.

Source: Black et al. 2023, DDPO (arXiv 2305.13301). Both in units of 500 kB, as yifan123/flow_grpo
has compressibility; its incompressibility is in kB.
"""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

from flowgrpo_jax.types import Metadata


def _sizes(images: np.ndarray) -> np.ndarray:
    """Sizes in units of 500 kB, f32 [B]."""
    sizes = []
    for image in images:
        buffer = io.BytesIO()
        Image.fromarray(np.asarray(image)).save(buffer, format="JPEG", quality=95)
        sizes.append(buffer.tell() / 1000 / 500)
    return np.asarray(sizes, np.float32)


def incompressibility(
    images: np.ndarray, prompts: Sequence[str], metadata: Sequence[Metadata]
) -> tuple[np.ndarray, np.ndarray]:
    """Size in kB / 500; detailed pictures score high."""
    return _sizes(images), np.ones(len(images), bool)


def compressibility(
    images: np.ndarray, prompts: Sequence[str], metadata: Sequence[Metadata]
) -> tuple[np.ndarray, np.ndarray]:
    """-size in kB / 500; plain pictures score high."""
    return -_sizes(images), np.ones(len(images), bool)
