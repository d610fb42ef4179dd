"""The layers that the models share, and the conversion of Flax NNX modules to plain functions.

NNX is used as a definition language only: a module says which parameters exist and how they
combine. `functional` turns an (abstract) module into a pure `apply(params, ...)` over a flat dict
`{"a/b/kernel": array}`, and everything outside this folder sees only that.

Parameter paths follow the PyTorch checkpoints' names, so that `convert.py` needs no table per
model: `/` for `.`, `kernel` for a transposed `weight`, `scale` for a norm's `weight`, and `3:7` for
layers 3 to 6 stacked along a new first axis.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from flowgrpo_jax.models import quantised
from flowgrpo_jax.models.products import Product, exact

Params = dict[str, Any]  # flat: path -> array, or ShapeDtypeStruct for an abstract model
# The patch projection of diffusers' PatchEmbed: a strided convolution in files, a linear here.
PATCHES = "pos_embed/proj/kernel"
Gather = Callable[[str, jax.Array], jax.Array]  # (path, parameter) -> the same, laid out otherwise


class LoRAParam(nnx.Param):
    """A trainable low-rank factor; every other parameter is frozen."""


class Linear(nnx.Module):
    """y = x W + b, plus `scale` (x A) B once `lora.add` has given it the factors A and B.

    W is stored in 8 bits, with a `kernel_scale`, once `quantise_stacks` has made it so.
    """

    lora_a: LoRAParam
    lora_b: LoRAParam
    lora_scale: float
    kernel_scale: nnx.Param

    def __init__(
        self,
        n_in: int,
        n_out: int,
        *,
        bias: bool = True,
        dtype: Any,
        product: Product = exact,
        rngs: nnx.Rngs,
    ):
        self.dtype, self.product = dtype, product
        self.kernel = nnx.Param(nnx.initializers.xavier_uniform()(rngs.params(), (n_in, n_out)))
        if bias:
            self.bias = nnx.Param(jnp.zeros((n_out,)))

    def __call__(self, x: jax.Array) -> jax.Array:
        # One leading axis: with two, XLA on the CPU takes a third longer for the gradients.
        leading, x = x.shape[:-1], x.astype(self.dtype).reshape(-1, x.shape[-1])
        if merged := self.merges():
            delta = self.lora_scale * (self.lora_a[...] @ self.lora_b[...])
            y = self.product(x, self.weight() + delta)
        elif hasattr(self, "kernel_scale"):
            y = quantised.product(x, self.kernel[...], self.kernel_scale[...], self.product)
        else:
            y = self.product(x, self.weight())
        if hasattr(self, "bias"):
            y = y + self.bias[...].astype(self.dtype)
        if hasattr(self, "lora_a") and not merged:
            low = x @ self.lora_a[...].astype(self.dtype)
            y = y + self.lora_scale * (low @ self.lora_b[...].astype(self.dtype))
        return y.reshape(*leading, y.shape[-1])

    def weight(self) -> jax.Array:
        """Return W in the compute dtype."""
        if hasattr(self, "kernel_scale"):
            return quantised.dequantise(self.kernel[...], self.kernel_scale[...], self.dtype)
        return self.kernel[...].astype(self.dtype)

    def merges(self) -> bool:
        """Return whether the product of the LoRA factors is added to the kernel before its use.

        Merging saves two thin matrix products per row, and the backward pass takes one product of
        the kernel's size in place of five thin ones. It pays off in a layer that is small compared
        with the rank. In half precision the sum would round the adapter's contribution away.
        """
        if not hasattr(self, "lora_a") or self.dtype != jnp.float32:
            return False
        n_in, n_out = self.kernel.shape[-2:]
        return n_in * n_out <= 4 * self.lora_a.shape[-1] * (n_in + n_out)


def stack(n: int, create: Callable[[nnx.Rngs], nnx.Module], rngs: nnx.Rngs) -> nnx.Module:
    """n equal modules as one, with every parameter stacked along a new first axis."""
    keys = jax.random.split(rngs.params(), n)
    return nnx.vmap(lambda key: create(nnx.Rngs(key)))(keys)


def quantise_stacks(model: nnx.Module) -> None:
    """Store the kernels of an abstract model's stacked linears in 8 bits (shapes only)."""
    for path, module in nnx.iter_modules(model):
        if isinstance(module, Linear) and ":" in name(path):
            kernel, scale = quantised.shapes(module.kernel.shape)
            module.kernel, module.kernel_scale = nnx.Param(kernel), nnx.Param(scale)


def scan(
    stacked: nnx.Module,
    call: Callable[[Any, Any], Any],
    carry: Any,
    *,
    unroll: bool = False,
    remat: bool = False,
    gather: Gather | None = None,
) -> Any:
    """Apply the modules of a stack one after another: carry = call(module, carry).

    A raw `lax.scan`: the compiler sees one block, not n. `unroll` is the same computation laid out
    in full (compiles longer, runs the same); `remat` recomputes a block's activations in the
    backward pass instead of keeping them; `gather` is done to a block's parameters, by their paths
    within it, before it runs, and again in the backward pass with `remat`.
    """
    graphdef, state = nnx.split(stacked)

    def body(carry: Any, layer: Any) -> tuple[Any, None]:
        if gather:
            parts = nnx.to_flat_state(layer)
            gathered = [(path, v.replace(gather(name(path), v.get_value()))) for path, v in parts]
            layer = nnx.from_flat_state(gathered)
        return call(nnx.merge(graphdef, layer), carry), None

    length = jax.tree.leaves(state)[0].shape[0]
    body = jax.checkpoint(body, prevent_cse=False) if remat else body
    return jax.lax.scan(body, carry, state, unroll=length if unroll else 1)[0]


def name(path: tuple[Any, ...]) -> str:
    return "/".join(str(part) for part in path)


def functional(model: nnx.Module) -> tuple[Callable[..., Any], Params]:
    """A module as a pure function and the shapes of its parameters.

    Args:
      model: a module, usually abstract (from `nnx.eval_shape`), so nothing is allocated.
    Returns:
      apply(params, *args, method="__call__", **kwargs), and {path: ShapeDtypeStruct | array}.
    """
    graphdef, state = nnx.split(model)
    variables = dict(nnx.to_flat_state(state))

    def apply(params: Params, *args: Any, method: str = "__call__", **kwargs: Any) -> Any:
        filled = [(path, v.replace(params[name(path)])) for path, v in variables.items()]
        module = nnx.merge(graphdef, nnx.from_flat_state(filled))
        return getattr(module, method)(*args, **kwargs)

    return apply, {name(path): v.get_value() for path, v in variables.items()}


def abstract(create: Callable[[nnx.Rngs], nnx.Module]) -> tuple[Callable[..., Any], Params]:
    """Return what `functional` returns, for a model whose parameters are not allocated."""
    return functional(nnx.eval_shape(lambda: create(nnx.Rngs(0))))


def initialise(create: Callable[[nnx.Rngs], nnx.Module], seed: int) -> Params:
    """Random parameters for a model that is trained from nothing (the bundled model)."""
    return jax.jit(lambda: functional(create(nnx.Rngs(seed)))[1])()


def timestep_embedding(t: jax.Array, width: int, max_period: float = 10_000.0) -> jax.Array:
    """Sinusoidal features [B, width] of t [B], cosine first, no frequency shift (SD3)."""
    half = width // 2
    freqs = jnp.exp(-jnp.log(max_period) * jnp.arange(half, dtype=jnp.float32) / half)
    angles = t.astype(jnp.float32)[:, None] * freqs
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)
