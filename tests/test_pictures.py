"""Pictures that users hand in, against what they look like: known pixels in many encodings."""

import base64
import io
import json

import numpy as np
import pytest
from PIL import Image

from flowgrpo_jax.storage import pictures
from flowgrpo_jax.transport import wire_format

# Three rows of two colours: no turn or reflection of it is equal to another.
COLOURS = np.array(
    [[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [255, 255, 0]], [[0, 0, 0], [90, 90, 90]]], np.uint8
)
# How a picture must have been stored so that its orientation makes it upright (EXIF 2.3, 4.6.4).
STORED = {
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.transpose(1, 0, 2),
    6: lambda x: np.rot90(x, 1),
    7: lambda x: x[::-1, ::-1].transpose(1, 0, 2),
    8: lambda x: np.rot90(x, -1),
}


def saved(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    buffer.seek(0)
    return buffer


def read(file):
    with Image.open(file) as image:
        return pictures.pixels(image)


@pytest.mark.parametrize("orientation", STORED)
def test_a_picture_is_upright_whatever_its_orientation(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = np.ascontiguousarray(STORED[orientation](COLOURS))
    np.testing.assert_array_equal(read(saved(Image.fromarray(stored), exif=exif)), COLOURS)


def test_a_jpeg_is_turned_as_well(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    halves = np.zeros((32, 64, 3), np.uint8)
    halves[:, 32:] = 255  # the right half, which is the lower one after a quarter turn
    Image.fromarray(halves).save(tmp_path / "a.jpg", exif=exif, quality=95)
    seen = pictures.read(tmp_path / "a.jpg")
    assert seen.shape == (64, 32, 3) and seen[:32].mean() < 5 and seen[32:].mean() > 250


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_what_is_transparent_is_white(mode):
    image = Image.new("RGBA", (3, 1))
    image.putdata([(0, 0, 0, 0), (0, 0, 0, 255), (0, 0, 0, 128)])
    kind = "TIFF" if mode == "PA" else "PNG"
    seen = (
        pictures.pixels(image.convert(mode))
        if mode == "PA"
        else read(saved(image.convert(mode), kind))
    )
    np.testing.assert_allclose(seen[0, :, 0], [255, 0, 127], atol=1)
    assert (seen == seen[..., :1]).all()


def test_a_transparent_colour_of_a_palette_or_of_no_palette_is_white():
    palette = Image.fromarray(np.array([[0, 1]], np.uint8), mode="L").convert("P")
    palette.putpalette([9, 9, 9, 200, 0, 0])
    np.testing.assert_array_equal(
        read(saved(palette, transparency=0)), [[[255, 255, 255], [200, 0, 0]]]
    )
    gif = read(saved(palette, "GIF", transparency=0))
    np.testing.assert_array_equal(gif, [[[255, 255, 255], [200, 0, 0]]])
    rgb = Image.fromarray(COLOURS)
    expected = COLOURS.copy()
    expected[0, 0] = 255
    np.testing.assert_array_equal(read(saved(rgb, transparency=(255, 0, 0))), expected)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_grey_of_16_bits_keeps_its_levels(kind):
    levels = np.array([[0, 257, 128 * 257, 65535], [300, 40000, 65000, 128]], np.uint16)
    seen = read(saved(Image.fromarray(levels), kind))
    assert seen.dtype == np.uint8 and seen.shape == (2, 4, 3)
    wanted = np.rint(levels / 65535 * 255)[..., None]
    np.testing.assert_array_equal(seen, np.broadcast_to(wanted, seen.shape))


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "YCbCr"])
def test_other_modes_are_as_pillow_converts_them(mode):
    image = Image.fromarray(COLOURS).convert(mode)
    np.testing.assert_array_equal(pictures.pixels(image), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_grey_without_a_known_range_is_an_error(dtype):
    with pytest.raises(ValueError, match=r"32 bits .* save it with 8 or 16 bits"):
        read(saved(Image.fromarray(np.ones((2, 2), dtype)), "TIFF"))


def test_a_reward_server_reads_pictures_in_the_same_way():
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = Image.fromarray(np.ascontiguousarray(STORED[6](COLOURS)))
    files = [saved(turned, exif=exif), saved(Image.fromarray(COLOURS).convert("RGBA"))]
    grey = np.full((3, 2), 300, np.uint16)
    body = request([*files, saved(Image.fromarray(grey))])
    images, _, _ = wire_format.decode(body, wire_format.Limits())
    np.testing.assert_array_equal(images, [COLOURS, COLOURS, np.ones_like(COLOURS)])
    with pytest.raises(ValueError, match="images of several sizes"):
        wire_format.decode(request([saved(turned, exif=exif), saved(turned)]), wire_format.Limits())


def request(files):
    images = [base64.b64encode(file.getvalue()).decode() for file in files]
    n = len(images)
    return json.dumps(
        {"images": {"png": images}, "prompts": [""] * n, "metadata": [{}] * n}
    ).encode()
