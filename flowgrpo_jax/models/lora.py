"""Low-rank adapters with PEFT's semantics: y += (alpha / rank) x A B.

Source: Hu et al. 2021 (arXiv 2106.09685). Init as PEFT's `gaussian`: A ~ N(0, 1/rank^2), B = 0, so
an adapter starts as the identity and "the reference policy" is the adapter with B = 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from flowgrpo_jax.models.layers import PATCHES, Linear, LoRAParam, Params, name


@dataclass(frozen=True)
class LoRASpec:
    """The linears that get an adapter (by the end of their dotted name, as in PEFT), and its size.

    Rank 0 means no adapter: all of the model's weights are trained.
    """

    rank: int
    alpha: float = 0.0
    targets: tuple[str, ...] = ()

    @property
    def scale(self) -> float:
        return self.alpha / self.rank if self.rank else 0.0


def add(model: nnx.Module, spec: LoRASpec) -> None:
    """Give every targeted linear of an abstract model its factors (shapes only).

    Raises ValueError when a target matches no linear, or the patch projection, which is a linear
    here but a convolution in torch: its adapter would have another shape there.
    """
    unused = set(spec.targets)
    for path, module in nnx.iter_modules(model):
        if not isinstance(module, Linear):
            continue
        dotted = "." + name(path).replace("/", ".")
        matched = {t for t in spec.targets if dotted.endswith("." + t)}
        if not matched:
            continue
        if name(path) + "/kernel" == PATCHES:
            raise ValueError(
                f"LoRA targets {sorted(matched)} match {dotted[1:]}, a convolution in the"
                " checkpoint: write longer names, such as 'ff.net.0.proj'"
            )
        unused -= matched
        *stacked, n_in, n_out = module.kernel.shape
        a = jax.ShapeDtypeStruct((*stacked, n_in, spec.rank), jnp.float32)
        b = jax.ShapeDtypeStruct((*stacked, spec.rank, n_out), jnp.float32)
        module.lora_a, module.lora_b = LoRAParam(a), LoRAParam(b)
        module.lora_scale = spec.scale
    if unused:
        raise ValueError(
            f"LoRA targets {sorted(unused)} match no linear of the model: lora.targets takes the"
            " ends of their dotted names, in whole parts, such as 'attn.to_q'"
        )


def split(shapes: Params) -> tuple[Params, Params]:
    """(lora, base) of a flat parameter dict."""
    lora = {k: v for k, v in shapes.items() if k.endswith(("/lora_a", "/lora_b"))}
    return lora, {k: v for k, v in shapes.items() if k not in lora}


def init(key: jax.Array, shapes: Params) -> Params:
    """f32 factors: A ~ N(0, 1/rank^2), B = 0."""
    lora = {}
    for i, (path, leaf) in enumerate(sorted(shapes.items())):
        if path.endswith("lora_a"):
            noise = jax.random.normal(jax.random.fold_in(key, i), leaf.shape, jnp.float32)
            lora[path] = noise / leaf.shape[-1]
        else:
            lora[path] = jnp.zeros(leaf.shape, jnp.float32)
    return lora


def reference(lora: Params) -> Params:
    """Return the adapter that changes nothing, which is the policy before training."""
    return {k: jnp.zeros_like(v) if k.endswith("lora_b") else v for k, v in lora.items()}
