"""Detectors: against torch's layers, OpenCV's reader, transformers' reading, and by hand."""

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from flowgrpo_jax.detection import coco, darknet, yolo
from flowgrpo_jax.detection.coco import Found

RNG = np.random.default_rng(0)


def test_the_classes_are_coco_s_in_order():
    """Contiguous ids of COCO, by hand: every detector's label 16 is a dog."""
    assert len(set(coco.CLASSES)) == 80
    by_id = {0: "person", 3: "motorcycle", 9: "traffic light", 16: "dog", 43: "knife", 49: "orange"}
    by_id |= {57: "couch", 64: "computer mouse", 65: "tv remote", 66: "computer keyboard"}
    by_id |= {62: "tv", 67: "cell phone", 78: "hair drier", 79: "toothbrush"}
    assert {i: coco.CLASSES[i] for i in by_id} == by_id


def weights():
    """The packaged weights' folder; skips without it."""
    try:
        return yolo.packaged()
    except ImportError as error:
        pytest.skip(str(error))


def test_the_classes_are_those_of_the_packaged_detector():
    theirs = {"motorbike", "aeroplane", "sofa", "pottedplant", "diningtable", "tvmonitor"}
    theirs |= {"mouse", "remote", "keyboard"}
    names = (weights() / "coco.names").read_text().split("\n")[:80]
    assert {name for name, ours in zip(names, coco.CLASSES) if name != ours} == theirs


def test_an_unknown_detector_is_an_error_that_lists_the_others():
    with pytest.raises(ValueError, match="'yolo9000' is unknown: choose from mask2former, small"):
        coco.load("yolo9000", None, 0.3, None)


def test_confident_cuts_sorts_and_caps_each_class():
    box = (0, 0, 1, 1)
    dogs = [Found("dog", s, box) for s in (0.5, 0.9, 0.3, 0.7)]
    cats = [Found("cat", s, box) for s in (0.31, 0.8)]
    kept = coco.confident([*dogs, *cats], threshold=0.3, most=2)
    assert [(f.cls, f.score) for f in kept] == [
        ("dog", 0.9),
        ("cat", 0.8),
        ("dog", 0.7),
        ("cat", 0.31),
    ]


# ----------------------------------------------------------------------------- darknet to onnx

CFG = """
[net]
# two heads, and every kind of section
width=48
height=32
channels=3
[convolutional]
batch_normalize=1
filters=6
size=3
stride=2
pad=1
activation=leaky
[route]
layers=-1
groups=2
group_id=1
[convolutional]
filters=5
size=1
pad=1
activation=linear
[route]
layers=-1, 0
[maxpool]
size=2
stride=2
[convolutional]
batch_normalize=1
filters=4
size=3
pad=1
activation=leaky
[convolutional]
filters=16
size=1
activation=linear
[yolo]
mask=1,2
anchors=4,5,  8,6,  12,20
classes=3
scale_x_y=1.05
[route]
layers=-3
[upsample]
stride=2
[maxpool]
size=2
stride=1
[maxpool]
size=5
stride=1
[route]
layers=-1,0
[convolutional]
filters=8
size=1
activation=linear  # of one anchor
[yolo]
mask=0
anchors=4,5,  8,6,  12,20
classes=3
"""


@pytest.fixture
def tiny(tmp_path):
    """CFG with random weights on disk, and the same network in torch: (folder, its forward)."""
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    f = torch.nn.functional
    numbers = []

    def conv(inputs, filters, size, norm, stride=1):
        bias, kernel = torch.randn(filters), torch.randn(filters, inputs, size, size)
        scale, mean, variance = torch.randn(filters), torch.randn(filters), torch.rand(filters)
        numbers.extend([bias, scale, mean, variance, kernel] if norm else [bias, kernel])

        def forward(x):
            if not norm:
                return f.conv2d(x, kernel, bias, stride, size // 2)
            x = f.conv2d(x, kernel, None, stride, size // 2)
            x = f.batch_norm(x, mean, variance, scale, bias, eps=1e-6)
            return f.leaky_relu(x, 0.1)

        return forward

    a, b, c = conv(3, 6, 3, True, 2), conv(3, 5, 1, False), conv(11, 4, 3, True)
    d, e = conv(4, 16, 1, False), conv(10, 8, 1, False)

    def forward(images):
        first = a(torch.from_numpy(images))
        both = torch.cat([b(first[:, 3:]), first], 1)
        deep = c(f.max_pool2d(both, 2))
        up = deep.repeat_interleave(2, 2).repeat_interleave(2, 3)
        up = f.max_pool2d(f.pad(up, (0, 1, 0, 1), value=-torch.inf), 2, 1)
        up = f.max_pool2d(up, 5, 1, padding=2)
        return [d(deep).numpy(), e(torch.cat([up, first], 1)).numpy()]

    (tmp_path / "tiny.cfg").write_text(CFG)
    header = np.array([0, 2, 5], "<i4").tobytes() + np.array([7], "<i8").tobytes()
    weights = b"".join(x.numpy().astype("<f4").tobytes() for x in numbers)
    (tmp_path / "tiny.weights").write_bytes(header + weights)
    return tmp_path, forward


def as_onnx(folder):
    pytest.importorskip("onnx")
    return darknet.to_onnx(folder / "tiny.cfg", folder / "tiny.weights")


def test_a_darknet_model_computes_what_torch_does(tiny):
    ort = pytest.importorskip("onnxruntime")
    folder, forward = tiny
    model, heads, size = as_onnx(folder)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    images = RNG.random((2, 3, 32, 48), np.float32)
    ours = session.run([head.output for head in heads], {"images": images})
    for mine, theirs in zip(ours, forward(images), strict=True):
        assert mine.shape == theirs.shape
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-4 * np.abs(theirs).max())
    assert size == (32, 48)
    np.testing.assert_array_equal(heads[0].anchors, [[8, 6], [12, 20]])
    np.testing.assert_array_equal(heads[1].anchors, [[4, 5]])
    assert [(h.classes, h.stretch) for h in heads] == [(3, 1.05), (3, 1)]


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("[maxpool]", "[shortcut]", r"no support for \[shortcut\]"),
        ("leaky", "mish", "activation=mish is not supported"),
        ("filters=8", "filters=9", "more are needed"),
        ("filters=5", "filters=4", "has .* inputs|needs .* weights"),
        ("[net]\n", "[region]\n", r"begins with a \[net\] section"),
        ("mask=0", "mask=0,1", "2 anchors, 3 classes has 8 inputs"),
    ],
)
def test_a_darknet_model_that_cannot_be_read_is_an_error(tiny, old, new, message):
    folder, _ = tiny
    (folder / "tiny.cfg").write_text(CFG.replace(old, new))
    with pytest.raises(ValueError, match=message):
        as_onnx(folder)


# ----------------------------------------------------------------------- reading YOLO's outputs


def head(anchors, classes=2, stretch=1.0):
    return darknet.Head("out", np.array(anchors, np.float32), classes, stretch)


def logit(p):
    return float(np.log(p / (1 - p)))


def test_decode_by_hand():
    """Two anchors of 16 x 8 and 8 x 32 px in a picture of 64 x 32, cells of 32 x 16 px."""
    output = np.zeros((1, 2, 7, 2, 2), np.float32)
    output[0, 1, :, 1, 0] = [
        logit(0.25),
        logit(0.75),
        np.log(2),
        0,
        logit(0.8),
        logit(0.5),
        logit(0.9),
    ]
    boxes, scores = yolo.decode(output.reshape(1, 14, 2, 2), head([[16, 8], [8, 32]]), (32, 64))
    # Anchor 0 in cell (row 0, column 1): centre (48, 8), all of its own size.
    np.testing.assert_allclose(boxes[1] * [64, 32, 64, 32], [40, 4, 56, 12], rtol=1e-6)
    np.testing.assert_allclose(scores[1], [0.25, 0.25])
    # Anchor 1 in cell (1, 0): centre (8, 16 + 12), twice as wide.
    np.testing.assert_allclose(boxes[6] * [64, 32, 64, 32], [0, 12, 16, 44], atol=1e-5)
    np.testing.assert_allclose(scores[6], [0.8 * 0.5, 0.8 * 0.9], rtol=1e-6)


def test_decode_stretches_centres_beyond_their_cell():
    output = np.zeros((1, 7, 1, 1), np.float32)
    output[0, :2, 0, 0] = [100, -100]
    boxes, _ = yolo.decode(output, head([[8, 8]], stretch=1.1), (32, 32))
    np.testing.assert_allclose((boxes[0, :2] + boxes[0, 2:]) / 2, [1.05, -0.05], atol=1e-6)


def test_distinct_keeps_the_surer_of_two_that_overlap():
    boxes = np.array([[0, 0, 10, 10], [0, 0, 10, 6], [0, 0, 10, 4], [50, 0, 60, 10.0]])
    scores = np.array([0.5, 0.9, 0.4, 0.6])
    assert yolo.distinct(boxes, scores, np.zeros(4, int)) == [1, 3]  # 6/10, and 4/6 with box 1
    assert yolo.distinct(boxes, scores, np.array([0, 1, 0, 0])) == [1, 3, 0, 2]  # 4/10 with box 0
    assert yolo.distinct(boxes[:0], scores[:0], np.zeros(0, int)) == []


def test_boxes_come_back_in_the_picture_s_pixels():
    """A network that sees a dog in the upper left quarter, whatever the picture's shape."""
    output = np.full((1, 85, 2, 2), -50, np.float32)
    output[0, :4] = 0
    output[0, [4, 5 + 16], 0, 0] = 50
    detect = yolo.detector(lambda x: [output], [head([[16, 16]], 80)], (32, 32), 0.5)
    [[dog], [same]] = detect(RNG.integers(0, 256, (2, 100, 300, 3), np.uint8))
    assert dog == same and dog[:2] == ("dog", pytest.approx(1)) and dog.mask is None
    assert dog.box == pytest.approx((0, 0, 150, 50))


# --------------------------------------------------------------------------- the small detector


def small(floor):
    for package in ("onnx", "onnxruntime"):
        pytest.importorskip(package)
    samples = weights().parent.parent / "samples"
    return coco.load("small", None, floor, None), samples


# What OpenCV 4.14's own Darknet reader and class-wise suppression say of the package's photos,
# at confidence 0.25, overlap 0.45 and the same resizing.
OPENCV = {
    "bus.jpg": [
        ("person", 0.9905, (52.2, 392.5, 221.3, 908.6)),
        ("person", 0.8985, (673.2, 379.6, 809.4, 874.9)),
        ("person", 0.8894, (214.1, 408.6, 349.9, 846.8)),
        ("bus", 0.7428, (0, 170.1, 706.6, 779.7)),
    ],
    "zidane.jpg": [
        ("person", 0.7915, (749.1, 11.2, 1118.4, 704.9)),
        ("tie", 0.4670, (980.3, 309.0, 1038.8, 420.2)),
    ],
}


@pytest.mark.parametrize("name", OPENCV)
def test_the_small_detector_sees_what_opencv_does(name):
    detect, photos = small(0.25)
    [found] = detect(np.asarray(Image.open(photos / name).convert("RGB"))[None])
    for ours, (cls, score, box) in zip(
        sorted(found, key=lambda f: -f.score), OPENCV[name], strict=True
    ):
        assert ours.cls == cls and ours.score == pytest.approx(score, abs=2e-3)
        np.testing.assert_allclose(ours.box, box, atol=1)


def test_a_folder_without_weights_is_an_error(tmp_path):
    small(0.5)
    with pytest.raises(FileNotFoundError, match=r"must hold one \.cfg file, it has 0"):
        coco.load("small", str(tmp_path), 0.5, None)


# ---------------------------------------------------------------------------------- mask2former


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


PICTURES = RNG.integers(0, 256, (2, 12, 12, 3), np.uint8).repeat(32, 1).repeat(32, 2)  # 384 px


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
