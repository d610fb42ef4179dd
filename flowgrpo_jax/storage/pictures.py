"""Pictures that users hand in, as files or in requests: every one of them is read here."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from flowgrpo_jax.storage import files

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")  # of the pictures in a folder
BACKGROUND = "white"  # behind what is transparent, as most viewers and browsers show it


def read(path: str | Path) -> np.ndarray:
    """A file's picture, uint8 [H, W, 3]; the first one of several.

    Raises OSError or ValueError for what is no picture that Pillow reads, and as `pixels` does.
    """
    with Image.open(path) as image:
        return pixels(image)


def probe(path: str | Path) -> None:
    """Read a file's header alone. Raises OSError for what is no picture that Pillow knows."""
    with Image.open(path):
        pass


def with_captions(folder: Path) -> Iterator[tuple[Path, str]]:
    """Yield the file of each picture NAME.png (or .jpg, .webp) of a folder with its caption, the
    text of NAME.txt, in the order of their names.

    Raises FileNotFoundError for a picture without a caption, which would otherwise go unused
    without a word, and ValueError for a caption that is not UTF-8.
    """
    for file in sorted(f for f in folder.iterdir() if f.suffix.lower() in SUFFIXES):
        caption = file.with_suffix(".txt")
        if not caption.is_file():
            raise FileNotFoundError(f"{file} has no caption: write it to {caption.name} beside it")
        yield file, files.read_text(caption).strip()


def fitted(
    picture: np.ndarray, height: int, width: int, resampling: Image.Resampling
) -> np.ndarray:
    """A picture uint8 [h, w, 3] as uint8 [height, width, 3]: the largest part of the wanted aspect
    from its middle, resized."""
    if picture.shape[:2] == (height, width):
        return picture
    return np.asarray(ImageOps.fit(Image.fromarray(picture), (width, height), resampling))


def pixels(image: Image.Image) -> np.ndarray:
    """A picture as people see it, uint8 [H, W, 3].

    It is turned as its EXIF orientation says, what is transparent becomes white, and grey of 16
    bits is scaled to 8, which Pillow's own conversion clips to white.

    Raises ValueError for grey of 32 bits, whose black and white no file says.
    """
    turned = ImageOps.exif_transpose(image)
    if turned.mode.startswith("I;16") or (turned.mode == "I" and image.format == "PNG"):
        return _eight_bits(np.asarray(turned), turned.info.get("transparency"))
    if turned.mode in ("I", "F"):
        raise ValueError(
            f"the picture has grey values of 32 bits (mode {turned.mode!r}), whose range is not"
            " known: save it with 8 or 16 bits"
        )
    if turned.has_transparency_data:
        paper = Image.new("RGBA", turned.size, BACKGROUND)
        turned = Image.alpha_composite(paper, turned.convert("RGBA"))
    return np.asarray(turned.convert("RGB"))


def _eight_bits(grey: np.ndarray, transparent: int | None) -> np.ndarray:
    """Levels 0 to 65535 [H, W], of which one may be transparent -> uint8 [H, W, 3]."""
    levels = ((grey.astype(np.uint32) + 128) // 257).astype(np.uint8)
    if transparent is not None:
        levels[grey == transparent] = 255
    return np.repeat(levels[..., None], 3, axis=-1)
