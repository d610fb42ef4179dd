"""Colours of objects: on synthetic crops, against people's names for colours, and against CLIP."""

import numpy as np
import pytest
from PIL import Image

from flowgrpo_jax.detection import clip_colors, colors
from flowgrpo_jax.detection.coco import Found
from flowgrpo_jax.detection.colors import COLORS, Crop, by_pixels, crop, on_grey
from flowgrpo_jax.models.towers.preprocess import MEAN, STD

RNG = np.random.default_rng(0)


def test_crop_takes_the_pixels_that_the_box_touches():
    picture = RNG.integers(0, 256, (20, 30, 3), np.uint8)
    mask = RNG.random((20, 30)) < 0.5
    cut = crop(picture, Found("dog", 0.9, (2.5, 4.0, 9.2, 12.0), mask))
    np.testing.assert_array_equal(cut.image, picture[4:12, 2:10])
    np.testing.assert_array_equal(cut.mask, mask[4:12, 2:10])
    assert cut.cls == "dog" and crop(picture, Found("dog", 0.9, (0, 0, 5, 5))).mask is None


@pytest.mark.parametrize(
    "box, shape",
    [
        ((-5, -5, 40, 40), (20, 30)),
        ((7, 7, 7, 7), (1, 1)),
        ((30, 20, 30, 20), (1, 1)),
        ((29.9, -3, 50, 0), (1, 1)),
    ],
)
def test_crop_never_leaves_the_picture_nor_comes_back_empty(box, shape):
    cut = crop(np.zeros((20, 30, 3), np.uint8), Found("dog", 0.9, box))
    assert cut.image.shape == (*shape, 3)


def test_on_grey_hides_what_is_not_the_object():
    picture = np.full((2, 2, 3), 7, np.uint8)
    mask = np.array([[True, False], [False, True]])
    np.testing.assert_array_equal(on_grey(Crop(picture, mask, "dog"))[..., 0], [[7, 153], [153, 7]])
    np.testing.assert_array_equal(on_grey(Crop(picture, None, "dog")), picture)


# ------------------------------------------------------------------------------------ by pixels


def patch(rgb, shape=(4, 4)):
    return np.broadcast_to(np.array(rgb, np.uint8), (*shape, 3)).copy()


def test_lab_of_colours_whose_values_are_published():
    """The sRGB primaries and white in CIELAB (D65), from Lindbloom's tables."""
    rgb = [[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255], [0, 0, 0]]
    wanted = [[53.24, 80.09, 67.20], [87.73, -86.18, 83.18], [32.30, 79.19, -107.86]]
    wanted += [[100, 0, 0], [0, 0, 0]]
    np.testing.assert_allclose(colors.lab(np.array(rgb)), wanted, atol=0.02)


def test_pixels_agree_with_people_s_names():
    """The colours that people called "red", "dark red" and so on in the xkcd survey (CC0)."""
    names = pytest.importorskip("matplotlib.colors").XKCD_COLORS
    shades = ("dark", "light", "bright", "deep", "medium", "pale", "rich", "strong", "vivid")
    asked, crops = [], []
    for name, value in names.items():
        *shade, color = name.removeprefix("xkcd:").split()
        if color in COLORS and (not shade or (len(shade) == 1 and shade[0] in shades)):
            asked.append(color)
            rgb = list(bytes.fromhex(value[1:]))
            crops.append(Crop(patch(rgb), None, "dog"))
    assert len(asked) > 50 and set(asked) == set(COLORS)
    right = [a == b for a, b in zip(asked, by_pixels(crops))]
    assert np.mean(right) > 0.95
    plain = [a for a, ok in zip(asked, right) if not ok]
    assert len(set(plain)) == len(plain)  # no colour is missed twice


def test_a_mask_decides_which_pixels_vote():
    picture = patch((200, 20, 20), (10, 10))
    picture[:3, :3] = (30, 150, 50)
    mask = np.zeros((10, 10), bool)
    mask[:3, :3] = True
    crops = [Crop(picture, mask, "dog"), Crop(picture, ~mask, "dog"), Crop(picture, None, "dog")]
    assert by_pixels(crops) == ["green", "red", "red"]


def test_without_a_mask_the_middle_votes():
    picture = patch((255, 255, 255), (20, 20))
    picture[4:16, 4:16] = (20, 40, 200)  # 36 % of the crop, all of its middle
    assert by_pixels([Crop(picture, None, "dog")]) == ["blue"]


def test_the_most_frequent_colour_wins_not_the_mean():
    picture = patch((250, 220, 20), (10, 10))
    picture[:, :4] = (10, 10, 200)
    assert by_pixels([Crop(picture, np.ones((10, 10), bool), "dog")]) == ["yellow"]


@pytest.mark.parametrize("shape", [(1, 1), (1, 30), (2, 3)])
def test_the_smallest_crops_have_a_colour(shape):
    empty = np.zeros(shape, bool)
    crops = [
        Crop(patch((0, 0, 0), shape), None, "dog"),
        Crop(patch((0, 0, 0), shape), empty, "dog"),
    ]
    assert by_pixels(crops) == ["black", "black"]
    assert by_pixels([]) == []


# ------------------------------------------------------------------------------------------ clip

WORDS = [*COLORS, "a", "photo", "of", "colored", "object", "dog", "teddy", "bear", "-"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A tiny random CLIP of 32 px with its tokenizer, on disk: (folder, model, tokenizer)."""
    torch = pytest.importorskip("torch")
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

    from flowgrpo_jax.worlds.pretraining.tokenizers import write_tokenizers

    root = tmp_path_factory.mktemp("clip")
    write_tokenizers(root, WORDS, length=10)
    tokenizer = CLIPTokenizer.from_pretrained(root / "tokenizer")
    layer = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
    ends = dict(eos_token_id=tokenizer.eos_token_id, bos_token_id=tokenizer.bos_token_id)
    text = layer | ends | dict(vocab_size=len(tokenizer), max_position_embeddings=20)
    vision = layer | dict(image_size=32, patch_size=8)
    torch.manual_seed(0)
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    model = CLIPModel(config).eval()
    for x in model.parameters():
        x.data += 0.2 * torch.randn_like(x)
    folder = root / "model"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder, model, tokenizer


CROPS = [
    Crop(RNG.integers(0, 256, (40, 52, 3), np.uint8), RNG.random((40, 52)) < 0.7, "dog"),
    Crop(RNG.integers(0, 256, (9, 33, 3), np.uint8), None, "teddy bear"),
    Crop(patch((250, 10, 10), (64, 32)), None, "dog"),
]


@pytest.mark.parametrize(
    "height, width", [(25, 50), (35, 41), (41, 35), (30, 31), (50, 57), (49, 98)]
)
def test_crops_lie_where_those_of_open_clip_do(height, width):
    """torchvision takes the longer side in whole numbers, rounded down, and crops at
    `int(round(left_over / 2.0))`, which rounds a half to the even number."""
    picture = RNG.integers(0, 256, (height, width, 3), np.uint8)
    full = [32 * side // min(height, width) for side in (width, height)]
    fitted = Image.fromarray(picture).resize(full, Image.Resampling.BICUBIC)
    left, top = (int(np.rint((side - 32) / 2)) for side in full)
    wanted = np.asarray(fitted)[top : top + 32, left : left + 32]
    ours = clip_colors.pixel_values(picture, 32).transpose(1, 2, 0) * STD + MEAN
    np.testing.assert_allclose(255 * ours, wanted, atol=1e-3)


def by_transformers(model, tokenizer, crop):
    """GenEval's classifier by CLIPModel's own forward pass: cosines with the ten colours."""
    import torch
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    processor = CLIPImageProcessorPil(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    )
    image = crop.image.copy()
    if crop.mask is not None:
        image[~crop.mask] = (0x99, 0x99, 0x99)
    pixels = processor(image, return_tensors="pt")["pixel_values"]
    cosines = []
    for color in COLORS:
        sentences = [f"a photo of a {color} {crop.cls}", f"a photo of a {color}-colored {crop.cls}"]
        sentences.append(f"a photo of a {color} object")
        texts = []
        for sentence in sentences:  # one by one: no padding
            with torch.no_grad():
                out = model(**tokenizer(sentence, return_tensors="pt"), pixel_values=pixels)
            texts.append(out.text_embeds[0])
        mean = torch.stack(texts).mean(0)
        cosines.append(float(mean / mean.norm() @ out.image_embeds[0]))
    return cosines


def test_clip_compares_as_transformers_does(clip):
    from flowgrpo_jax.detection import clip_colors

    _, model, tokenizer = clip
    ours = clip_colors.similarities(model, tokenizer)(CROPS)
    theirs = np.array([by_transformers(model, tokenizer, crop) for crop in CROPS])
    assert theirs.std(1).min() > 1e-3  # the colours do differ
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    classify = clip_colors.classifier(model, tokenizer)
    assert classify(CROPS) == [COLORS[i] for i in theirs.argmax(1)]
    assert classify([]) == []


def test_clip_loads_from_a_directory(clip):
    from flowgrpo_jax.detection import clip_colors

    folder, model, tokenizer = clip
    loaded = clip_colors.load(str(folder), "cpu")
    assert loaded(CROPS) == clip_colors.classifier(model, tokenizer)(CROPS)


def test_absent_clip_weights_are_an_error(tmp_path):
    pytest.importorskip("torch")
    from flowgrpo_jax.detection import clip_colors

    with pytest.raises(FileNotFoundError, match=r"geneval\.clip_path to a local copy"):
        clip_colors.load(str(tmp_path / "nowhere"), "cpu")
