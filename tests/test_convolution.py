"""The convolution with a gradient of its own against that of JAX."""

import re

import jax
import numpy as np
import pytest

from flowgrpo_jax.models.convolution import conv_general_dilated

NHWC = ("NHWC", "HWIO", "NHWC")
SHAPES = {  # (window, strides, padding)
    "keeps the size": ((3, 3), (1, 1), ((1, 1), (1, 1))),
    "of two sizes": ((5, 1), (1, 1), ((2, 2), (0, 0))),
    "pointwise": ((1, 1), (1, 1), ((0, 0), (0, 0))),
    "halves the size": ((3, 3), (2, 2), ((0, 1), (0, 1))),
    "no padding": ((3, 3), (1, 1), ((0, 0), (0, 0))),
    "even": ((2, 2), (1, 1), ((1, 0), (1, 0))),
}


def gradients(convolve, x, kernel, weight, strides, padding):
    def total(x, kernel):
        return (weight * convolve(x, kernel, strides, padding, dimension_numbers=NHWC)).sum()

    return jax.jit(jax.value_and_grad(total, (0, 1)))(x, kernel)


@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients_are_those_of_jax(shape):
    window, strides, padding = SHAPES[shape]
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(2, 8, 6, 3)), rng.normal(size=(*window, 3, 5))
    plain = jax.lax.conv_general_dilated
    y = plain(x, kernel, strides, padding, dimension_numbers=NHWC)
    weight = rng.normal(size=y.shape)
    ours, theirs = (
        gradients(convolve, x, kernel, weight, strides, padding)
        for convolve in (conv_general_dilated, plain)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), ours, theirs)


def test_no_gradient_in_a_loop_on_the_cpu_swaps_the_channels_of_a_kernel():
    """As JAX's own does, with "01oi" in place of "01io": the decoder's gradient in DRaFT was slow
    for that."""
    x, kernel = np.ones((2, 8, 8, 4), np.float32), np.ones((3, 3, 4, 4), np.float32)
    _, strides, padding = SHAPES["keeps the size"]

    def loss(x, kernel):
        y = conv_general_dilated(x, kernel, strides, padding, dimension_numbers=NHWC)
        return (y**2).sum()

    def steps(x, kernel):
        return jax.lax.fori_loop(0, 3, lambda _, x: jax.grad(loss)(x, kernel), x)

    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        text = jax.jit(steps).lower(x, kernel).compile().as_text()
    layouts = re.findall(r" convolution\(.*dim_labels=(\S+?),", text)
    assert layouts == ["b01f_01io->b01f"] * 2
