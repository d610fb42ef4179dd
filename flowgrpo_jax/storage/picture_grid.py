"""Pictures with their captions on one sheet."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw


def grid(
    images: np.ndarray, captions: Sequence[str], columns: int = 6, side: int = 128
) -> Image.Image:
    """Pictures uint8 [B, H, W, 3] in rows, the longer side `side` px, with their captions below."""
    line, rows = 14, math.ceil(len(images) / columns)
    cell = (side + 6, side + 2 * line + 6)
    sheet = Image.new("RGB", (cell[0] * columns, cell[1] * rows), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (image, caption) in enumerate(zip(images, captions)):
        x, y = i % columns * cell[0] + 3, i // columns * cell[1] + 3
        picture = Image.fromarray(np.asarray(image))
        longer = max(picture.size)
        size = [round(side * length / longer) for length in picture.size]
        filter_ = Image.Resampling.LANCZOS if longer > side else Image.Resampling.BICUBIC
        sheet.paste(picture.resize(size, filter_), (x, y))
        draw.multiline_text((x, y + side + 1), _wrap(caption, side // 6), fill="black", spacing=1)
    return sheet


def _wrap(text: str, width: int) -> str:
    """Two lines of at most `width` letters."""
    first, rest = "", text.split()
    while rest and len(first) + len(rest[0]) < width:
        first = f"{first} {rest.pop(0)}".strip()
    return f"{first}\n{' '.join(rest)[:width]}"
