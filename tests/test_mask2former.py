"""Mask2Former: it is read as transformers reads it."""

import numpy as np
import pytest
from scipy import ndimage

from flowgrpo_jax.detection import coco

RNG = np.random.default_rng(0)
PICTURES = RNG.integers(0, 256, (2, 12, 12, 3), np.uint8).repeat(32, 1).repeat(32, 2)  # 384 px


@pytest.fixture(scope="module")
def mask2former():
    """A tiny random Mask2Former whose class logits differ by enough to matter."""
    torch = pytest.importorskip("torch")
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

    swin = SwinConfig(
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 2, 2],
        window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    sizes = dict(feature_size=32, mask_feature_size=32, hidden_dim=32, num_attention_heads=2)
    depths = dict(encoder_layers=1, decoder_layers=2, num_queries=12, num_labels=80)
    wide = dict(encoder_feedforward_dim=16, dim_feedforward=16)
    torch.manual_seed(0)
    model = Mask2FormerForUniversalSegmentation(
        Mask2FormerConfig(backbone_config=swin, **sizes, **depths, **wide)
    )
    model.class_predictor.weight.data *= 100
    return model.eval()


def sorted_by_score(found):
    return sorted(found, key=lambda f: -f.score)


def test_mask2former_is_read_as_transformers_reads_it(mask2former):
    import torch
    from transformers.models.mask2former.image_processing_pil_mask2former import (
        Mask2FormerImageProcessorPil,
    )

    from flowgrpo_jax.detection import mask2former as ours

    with torch.inference_mode():
        out = mask2former(pixel_values=ours.inputs(torch.tensor(PICTURES)))
    # Its masks are always 384 px wide: the size of our pictures, so that both read the same grid.
    theirs = Mask2FormerImageProcessorPil().post_process_instance_segmentation(
        out, threshold=0.0, return_binary_maps=True
    )
    found = ours.detector(mask2former, 0.0)(PICTURES)
    assert min(map(len, found)) > 3 and len({f.cls for f in found[0]}) > 1
    for mine, other in zip(found, theirs, strict=True):
        records = sorted(
            zip(other["segments_info"], other["segmentation"]), key=lambda x: -x[0]["score"]
        )
        for thing, (record, mask) in zip(sorted_by_score(mine), records, strict=True):
            assert thing.cls == coco.CLASSES[record["label_id"]]
            assert thing.score == pytest.approx(record["score"], abs=2e-6)
            np.testing.assert_array_equal(thing.mask, mask.numpy() > 0)
            [(rows, columns)] = ndimage.find_objects(thing.mask.astype(int))
            assert thing.box == (columns.start, rows.start, columns.stop, rows.stop)


def test_mask2former_s_floor_leaves_out_the_unsure_alone(mask2former):
    from flowgrpo_jax.detection import mask2former as ours

    everything = sorted_by_score(ours.detector(mask2former, 0.0)(PICTURES[:1])[0])
    floor = everything[len(everything) // 2].score
    some = sorted_by_score(ours.detector(mask2former, floor)(PICTURES[:1])[0])
    wanted = [(f.cls, f.box) for f in everything if f.score > floor]
    assert 0 < len(wanted) < len(everything) and [(f.cls, f.box) for f in some] == wanted
    assert ours.detector(mask2former, 0.999999)(PICTURES[:1]) == [[]]


def test_masks_come_back_in_the_picture_s_size(mask2former):
    from flowgrpo_jax.detection import mask2former as ours

    [found] = ours.detector(mask2former, 0.0)(PICTURES[:1, :64, :96])
    assert found and all(f.mask.shape == (64, 96) for f in found)


@pytest.mark.parametrize("shape", [(64, 64), (48, 64), (40, 100)])
def test_mask2former_s_input_is_transformers_(shape):
    torch = pytest.importorskip("torch")
    from transformers.models.mask2former.image_processing_pil_mask2former import (
        Mask2FormerImageProcessorPil,
    )

    from flowgrpo_jax.detection import mask2former as ours

    picture = RNG.integers(0, 256, (*shape, 3), np.uint8)
    theirs = Mask2FormerImageProcessorPil()(picture, return_tensors="np")["pixel_values"]
    mine = ours.inputs(torch.tensor(picture[None])).numpy()
    assert mine.shape == theirs.shape
    np.testing.assert_allclose(mine, theirs, atol=1.1 / 255 / 0.224)  # PIL rounds to 8 bits


def test_mask2former_loads_from_a_directory(mask2former, tmp_path):
    from flowgrpo_jax.detection import mask2former as ours

    mask2former.save_pretrained(tmp_path)
    [found] = coco.load("mask2former", str(tmp_path), 0.0, "cpu")(PICTURES[:1, :32, :32])
    [wanted] = ours.detector(mask2former, 0.0)(PICTURES[:1, :32, :32])
    assert [f[:3] for f in found] == [f[:3] for f in wanted]
    mask2former.config.num_labels, before = 133, mask2former.config.num_labels
    mask2former.config.save_pretrained(tmp_path)
    mask2former.config.num_labels = before
    with pytest.raises((ValueError, RuntimeError)):
        coco.load("mask2former", str(tmp_path), 0.0, "cpu")


def test_absent_mask2former_weights_are_an_error(tmp_path):
    pytest.importorskip("torch")
    with pytest.raises(FileNotFoundError, match=r"geneval\.detector_path to a local copy"):
        coco.load("mask2former", str(tmp_path / "nowhere"), 0.3, "cpu")
