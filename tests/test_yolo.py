"""YOLO's outputs: boxes and scores by hand."""

import numpy as np
import pytest

from flowgrpo_jax.detection import darknet, yolo

RNG = np.random.default_rng(0)


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
