"""Products of matrices with operands in bfloat16 and sums in f32, for models that compute in f32.

CPUs with AVX512-BF16 or AMX multiply bfloat16 at twice the speed of f32 and more, while everything
else that they do in bfloat16 takes longer. Rounding the operands of linears alone keeps weights,
activations and sums in f32. Each operand's relative error is at most 2^-9. The small products of
attention stay as they are: there the conversion takes longer than it saves.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

Product = Callable[[jax.Array, jax.Array], jax.Array]  # [..., M, K], [..., K, N] -> [..., M, N]

CHOICES = ("", "auto", "bfloat16")
CPU_FLAGS = {"avx512_bf16", "amx_bf16"}  # of Linux


def exact(x: jax.Array, y: jax.Array) -> jax.Array:
    """The product in the operands' dtype."""
    return x @ y


@jax.custom_vjp
def bfloat16(x: jax.Array, y: jax.Array) -> jax.Array:
    """The product of x and y, f32 with the same leading axes, rounded to bfloat16. So are the two
    products of its gradient."""
    return _rounded(x, y)


def _rounded(x: jax.Array, y: jax.Array) -> jax.Array:
    x, y = x.astype(jnp.bfloat16), y.astype(jnp.bfloat16)
    return jnp.matmul(x, y, preferred_element_type=jnp.float32)


def _forward(x: jax.Array, y: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _rounded(x, y), (x.astype(jnp.bfloat16), y.astype(jnp.bfloat16))


def _backward(
    operands: tuple[jax.Array, jax.Array], slope: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, y = operands
    return _rounded(slope, jnp.swapaxes(y, -1, -2)), _rounded(jnp.swapaxes(x, -1, -2), slope)


bfloat16.defvjp(_forward, _backward)


def load(name: str, mesh: Mesh | AbstractMesh, dtype: str) -> Product:
    """Return the product of a choice: "" is exact, "auto" is bfloat16 for models in f32 on CPUs
    that have instructions for it, and exact elsewhere."""
    on_cpu = isinstance(mesh, Mesh) and mesh.devices.flat[0].platform == "cpu"
    suits = on_cpu and jnp.dtype(dtype) == jnp.float32 and cpu_has_bfloat16()
    return bfloat16 if name == "bfloat16" or (name == "auto" and suits) else exact


def cpu_has_bfloat16(cpuinfo: str = "/proc/cpuinfo") -> bool:
    """Whether the CPU has instructions for products of bfloat16; False where nothing says so."""
    try:
        lines = Path(cpuinfo).read_text().splitlines()
    except OSError:
        return False
    flags = next((line for line in lines if line.startswith("flags")), "")
    return bool(CPU_FLAGS & set(flags.split()))
