"""Kernels that attend with streams of tokens, against flax's norm and jax's attention."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from token_streams import by_jax, streams

from flowgrpo_jax import sharding
from flowgrpo_jax.costs import cost
from flowgrpo_jax.models import attention, joint_attention, joint_kernel, kernel_check

INTERPRETED = pltpu.force_tpu_interpret_mode
KERNELS = {"xla": contextlib.nullcontext, "flash": INTERPRETED, "joint": INTERPRETED}


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize(
    "lengths, heads, channels, normed",
    [((300, 77), 4, 64, True), ((140,), 4, 32, True), ((130, 13), 1, 128, False)],
)
def test_streams_attend_as_one_sequence(monkeypatch, name, lengths, heads, channels, normed):
    """Values and gradients, also to the scales of the norms; two, four heads and one in a vector of
    a TPU; lengths of several blocks of queries and a rest, and of a part of one."""
    monkeypatch.setattr(joint_kernel, "LARGEST_BLOCK", 128)
    given = streams(lengths, heads, channels, normed)
    rng = np.random.default_rng(1)
    cotangents = [jnp.asarray(rng.normal(size=s.q.shape), jnp.float32) for s in given]

    def both(kernel):
        y, back = jax.vjp(lambda given: kernel(given, heads), given)
        return y, back(cotangents)

    with KERNELS[name]():
        found = jax.jit(lambda: both(attention.TABLE[name]))()
    for a, b in zip(*map(jax.tree.leaves, (found, both(by_jax))), strict=True):
        np.testing.assert_allclose(a, b, atol=3e-6 * np.abs(b).max())


def test_heads_that_do_not_fill_a_vector():
    """Three heads of 64 channels, as one of two devices has of six: the other kernel takes them. So
    it does for images of 2,048 px, whose tokens do not fit the memory of a chip."""
    given = streams((130, 13), 3, 64, normed=True)
    with pytest.raises(ValueError, match=r"3 heads of 64 channels .*model.attention='flash'"):
        joint_attention.attend(given, 3)
    with INTERPRETED():
        found = jax.jit(lambda: attention.joint(given, 3))()
    for a, b in zip(found, by_jax(given, 3), strict=True):
        np.testing.assert_allclose(a, b, atol=3e-6)
    for pixels, taken in ((1024, True), (2048, False)):
        tokens = ((pixels // 16) ** 2, 333)
        described = jax.eval_shape(lambda: streams(tokens, 24, 64, True, jnp.bfloat16))  # noqa: B023
        assert joint_attention.fits(described, 24) == taken


def test_the_joint_kernel_counts_what_is_needed():
    """Two products of its tokens forward and five backward, though it multiplies whole vectors."""
    given, tokens = streams((200, 56), 4, 64, normed=True), 256
    one = 2 * 2 * 4 * 64 * tokens * tokens

    def loss(given):
        return sum(y.sum() for y in joint_attention.attend(given, 4))

    assert cost.flops(jax.make_jaxpr(loss)(given)) == 2 * one
    assert cost.flops(jax.make_jaxpr(jax.grad(loss))(given)) == (2 + 5) * one


def without_a_scale(given, heads):
    return attention.PLAIN([s._replace(k_scale=None) for s in given], heads)


def without_text(given, heads):
    image, text = attention.PLAIN(given, heads)
    return [image, text * jnp.nan]


@pytest.mark.parametrize("wrong", [without_a_scale, without_text])
def test_a_wrong_kernel_is_an_error_before_a_run(monkeypatch, wrong):
    """The plain one, rounded to bfloat16, is within the tolerance."""

    def right(given, heads):
        return attention.PLAIN(given, heads)

    here = sharding.make_mesh(devices=jax.devices()[:1])
    monkeypatch.setattr(attention, "suited", lambda *_: ("joint", "xla"))
    monkeypatch.setitem(attention.TABLE, "joint", right)
    attention.load("auto", here, "bfloat16")
    monkeypatch.setitem(attention.TABLE, "joint", wrong)
    with pytest.raises(RuntimeError, match=r"'joint' is wrong on 'cpu' .* set model.attention=xla"):
        attention.load("auto", here, "bfloat16")


def test_the_check_has_whole_blocks_and_a_part_of_one():
    block = joint_kernel.Shape(2, kernel_check.TOKENS, 256, 64).block
    assert kernel_check.TOKENS[0] > block and kernel_check.TOKENS[0] % block
