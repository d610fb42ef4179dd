"""A convolution whose gradient is as fast as itself, also on a CPU."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp


def conv_general_dilated(
    x: jax.Array,
    kernel: jax.Array,
    strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    **options: Any,
) -> jax.Array:
    """`jax.lax.conv_general_dilated` of x [B, H, W, C] with a kernel [h, w, C, D], as `nnx.Conv`
    calls it.

    JAX writes the gradient with respect to x as a convolution whose kernel has its channels
    swapped. XLA on the CPU makes that a fast one in the main computation alone: within a loop, such
    as the one over micro-batches, it takes 13 times as long. Where the convolution keeps the
    picture's size, the kernel is turned and its channels are swapped here, ahead of a convolution
    like the first one. The numbers are the same.
    """

    def plain(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return jax.lax.conv_general_dilated(x, kernel, strides, padding, **options)

    if not keeps_size(kernel.shape[:2], strides, padding, options):
        return plain(x, kernel)

    def forward(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        return plain(x, kernel), (x, kernel)

    def backward(
        saved: tuple[jax.Array, jax.Array], cotangent: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        x, kernel = saved
        of_x = plain(cotangent, jnp.flip(kernel, (0, 1)).swapaxes(2, 3))
        (of_kernel,) = jax.vjp(partial(plain, x), kernel)[1](cotangent)
        return of_x, of_kernel

    convolve = jax.custom_vjp(plain)
    convolve.defvjp(forward, backward)
    return convolve(x, kernel)


def keeps_size(
    window: Sequence[int],
    strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    options: dict[str, Any],
) -> bool:
    """Whether the window is odd, moves by 1 and is padded by half of it, without dilation, groups
    or products of another type."""
    half = [(size // 2, size // 2) for size in window]
    dilations = *options.get("lhs_dilation", ()), *options.get("rhs_dilation", ())
    return (
        all(size % 2 for size in window)
        and {*strides, *dilations, options.get("feature_group_count", 1)} == {1}
        and [tuple(pair) for pair in padding] == half
        and options.get("preferred_element_type") is None
    )
