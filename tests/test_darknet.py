"""Darknet's models as ONNX: they compute what torch's layers do."""

import numpy as np
import pytest

from flowgrpo_jax.detection import darknet

RNG = np.random.default_rng(0)

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
