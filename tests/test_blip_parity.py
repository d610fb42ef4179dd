"""ImageReward's model against transformers' BLIP and torch's own layers, with tiny weights."""

import dataclasses

import jax
import numpy as np
import pytest
from torch_models import TOLERANCE, abstract, channels_last, torch, worst
from torch_towers import (
    BLIP_TEXT,
    BLIP_VISION,
    TorchImageReward,
    pictures,
    tensor_pixels,
    torch_head,
)

from flowgrpo_jax.models import convert
from flowgrpo_jax.models.towers.aesthetic_head import Head
from flowgrpo_jax.models.towers.blip import BLIPConfig, ImageReward
from flowgrpo_jax.models.weight_files import open_file

CONFIG = BLIPConfig.read({**BLIP_TEXT, **BLIP_VISION, "fusion": "of no interest"})


@pytest.fixture(scope="module")
def theirs():
    return TorchImageReward()


@pytest.fixture(scope="module")
def run(theirs, tmp_path_factory):
    file = tmp_path_factory.mktemp("blip") / "ImageReward.pt"
    torch.save(theirs.state_dict(), file)
    apply, shapes = abstract(ImageReward, CONFIG)
    tensors = ImageReward.needed(open_file(file))
    where = dict(where="here", ignore=ImageReward.ignored)
    params = convert.from_tensors(tensors, shapes, **where)
    return jax.jit(lambda *inputs: apply(params, *inputs))


def inputs(lengths=(3, 12, 7)):
    """Ids and mask of texts of these lengths, and pixels."""
    rng = np.random.default_rng(0)
    ids = rng.integers(1, BLIP_TEXT["vocab_size"], (3, 12))
    mask = np.arange(12) < np.array(lengths)[:, None]
    return np.where(mask, ids, 0), mask, tensor_pixels(pictures(3), BLIP_VISION["image_size"])


def test_image_reward(theirs, run):
    ids, mask, pixels = inputs()
    wanted = theirs(torch.tensor(ids), torch.tensor(mask).long(), pixels)
    ours = run(ids, mask, channels_last(pixels).numpy())
    assert ours.shape == (3,) and worst(ours, wanted) <= TOLERANCE


def test_text_and_image_both_matter_and_padding_does_not(run):
    ids, mask, pixels = inputs()
    pixels = channels_last(pixels).numpy()
    score = np.asarray(run(ids, mask, pixels))
    padded = np.where(mask, ids, 5)
    np.testing.assert_allclose(run(padded, mask, pixels), score, rtol=1e-6)
    assert np.abs(np.asarray(run(ids[::-1].copy(), mask[::-1].copy(), pixels)) - score)[0] > 1e-4
    assert np.abs(np.asarray(run(ids, mask, pixels[::-1].copy())) - score)[0] > 1e-4


def test_the_head():
    theirs = torch_head(20)
    apply, shapes = abstract(Head, 20)
    tensors = {name: x.numpy() for name, x in theirs.state_dict().items()}
    params = convert.from_torch_names(tensors, shapes)
    x = np.random.default_rng(0).normal(size=(5, 20)).astype(np.float32)
    with torch.no_grad():
        wanted = theirs.layers(torch.tensor(x))[:, 0]
    assert worst(apply(params, x), wanted) <= TOLERANCE


def test_the_published_size():
    """ViT-L/16 of 303.3 M and BERT with cross-attention as in BLIP, from their layer sizes."""
    shapes = abstract(ImageReward, BLIPConfig())[1]
    count = lambda part: sum(  # noqa: E731
        int(np.prod(x.shape)) for name, x in shapes.items() if name.startswith(part)
    )
    assert count("blip/visual_encoder") == 303_301_632  # timm's vit_large_patch16_224, no classes
    d, v = 768, 1024
    layer = 4 * (d * d + d) + 2 * (d * d + d) + 2 * (v * d + d) + 8 * d * d + 4 * d + d + 6 * d
    assert count("blip/text_encoder") == (30524 + 512) * d + 2 * d + 12 * layer


def test_other_activations_are_an_error():
    with pytest.raises(ValueError, match="hidden_act is 'relu'"):
        dataclasses.replace(CONFIG, hidden_act="relu")
