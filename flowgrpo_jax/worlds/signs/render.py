"""Draw a sign: a board on a wall with capital letters on it.

Coordinates are whole pixels, x to the right and y down. Letters stand in the middle of cells of one
width, as on a letter board: where a letter is does not depend on which ones are beside it, so a
small model can learn each letter at each place.
"""

from functools import cache
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

BOARDS = {  # name: (board, letters), dark on light or light on dark
    "white": ((245, 245, 240), (25, 25, 25)),
    "yellow": ((250, 215, 50), (25, 25, 25)),
    "red": ((190, 25, 35), (245, 245, 240)),
    "green": ((15, 110, 60), (245, 245, 240)),
    "blue": ((25, 70, 170), (245, 245, 240)),
    "black": ((30, 30, 30), (250, 215, 50)),
}
WALLS = ((205, 200, 190), (170, 180, 190))
REACH = 29  # px from the middle of a board to its left and right
RIM = 5  # px between the letters and the board's upper and lower edge
CELL = 18  # px a letter, less where more than three share a board
GAP = 2  # px between the widest letters
FINE = 8  # samples a pixel, either way, of a letter
CAPITAL = 0.7  # height of a capital in ems, of the font that comes with Pillow
BOLD = 0.5  # px that strokes are wider, either way, than the font's


class Sign(NamedTuple):
    """A sign: its text, its board's name, the wall's colour, its middle and its letters' height."""

    text: str
    board: str
    wall: tuple[int, int, int]
    x: int
    y: int
    height: int


@cache
def glyph(letter: str, height: int, width: int) -> np.ndarray:
    """The share f32 [height + 2 RIM, width] of each pixel that a capital of `height` px covers. It
    stands in the middle; if it is too wide, it is squeezed."""
    font, stroke = ImageFont.load_default(height * FINE / CAPITAL), round(BOLD * FINE)
    left, _, right, _ = font.getbbox(letter, anchor="ls", stroke_width=stroke)
    canvas = Image.new("L", (max(int(right - left), width * FINE), (height + 2 * RIM) * FINE))
    corner = (canvas.width - right - left) / 2, (height + RIM) * FINE
    ImageDraw.Draw(canvas).text(corner, letter, 255, font, anchor="ls", stroke_width=stroke)
    small = canvas.resize((width, height + 2 * RIM), Image.Resampling.BOX)
    return np.asarray(small, np.float32) / 255


def render(sign: Sign, size: int = 64) -> np.ndarray:
    """The picture of `sign`, uint8 RGB [size, size, 3]."""
    board, ink = (np.array(color, np.float32) for color in BOARDS[sign.board])
    image = np.empty((size, size, 3), np.float32)
    image[:] = sign.wall
    top, left = sign.y - sign.height // 2 - RIM, sign.x - REACH
    rows = slice(top, top + sign.height + 2 * RIM)
    image[rows, left : left + 2 * REACH] = board
    cell = min(CELL, 2 * REACH // len(sign.text))
    start = sign.x - cell * len(sign.text) // 2
    for i, letter in enumerate(sign.text):
        share = glyph(letter, sign.height, cell - GAP)
        at = start + i * cell + GAP // 2
        patch = image[rows, at : at + cell - GAP]
        patch += share[..., None] * (ink - patch)
    return (image + 0.5).astype(np.uint8)
