"""The adapter: its start, its size, its targets, and how it is merged."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from lora_factors import shapes_of
from scipy import stats

from flowgrpo_jax.models import lora, lora_files
from flowgrpo_jax.models.layers import Linear, LoRAParam
from flowgrpo_jax.models.lora import LoRASpec
from flowgrpo_jax.models.sd3 import JOINT_ATTENTION
from flowgrpo_jax.models.sd3.architecture import PUBLISHED


def test_start_is_drawn_as_pefts_gaussian():
    """A ~ N(0, 1 / rank^2), each factor its own draw; B = 0."""
    factors = lora.init(jax.random.key(0), shapes_of(LoRASpec(8, 16.0, JOINT_ATTENTION))[0])
    a = [np.asarray(v).reshape(-1, 8) for k, v in factors.items() if k.endswith("lora_a")]
    b = [v for k, v in factors.items() if k.endswith("lora_b")]
    assert len(a) == len(b) and not any(np.any(x) for x in b)
    drawn = np.concatenate(a)
    assert stats.kstest(8 * drawn.ravel(), "norm").pvalue > 0.01
    assert len(np.unique(drawn)) > 0.99 * drawn.size  # no two factors or layers alike


def test_published_sizes():
    """Rank 32 on the joint attention of the two full-size models."""
    for name, linears, parameters in (("medium", 191, 18_776_064), ("large", 303, 47_161_344)):
        config = PUBLISHED[f"stabilityai/stable-diffusion-3.5-{name}"].transformer
        shapes = shapes_of(LoRASpec(32, 64.0, JOINT_ATTENTION), config)[0]
        names = lora_files.to_torch({k: np.broadcast_to(0, v.shape) for k, v in shapes.items()})
        assert len(names) == 2 * linears
        assert sum(x.size for x in names.values()) == parameters


@pytest.mark.parametrize("padded", [4, 16])
def test_a_merged_adapter_acts_as_one_beside_its_kernel(padded):
    """Rank 1 stays beside these kernels; the same filled up with zeros to more is merged."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(5, 3, 12)), jnp.float32)
    kernel, bias, a, b = (
        jnp.asarray(rng.normal(size=shape), jnp.float32)
        for shape in ((12, 20), (20,), (12, 1), (1, 20))
    )

    def linear(rank, a, b, dtype=jnp.float32):
        module = nnx.eval_shape(lambda: Linear(12, 20, dtype=dtype, rngs=nnx.Rngs(0)))
        module.kernel, module.bias = nnx.Param(kernel), nnx.Param(bias)
        fill = rank - a.shape[1]
        module.lora_a = LoRAParam(jnp.pad(a, ((0, 0), (0, fill))))
        module.lora_b = LoRAParam(jnp.pad(b, ((0, fill), (0, 0))))
        module.lora_scale = 0.7
        return module

    assert not linear(1, a, b).merges() and linear(padded, a, b).merges()
    wanted = np.asarray(x) @ (np.asarray(kernel) + 0.7 * np.asarray(a) @ np.asarray(b)) + bias
    for rank in (1, padded):
        np.testing.assert_allclose(linear(rank, a, b)(x), wanted, rtol=1e-5, atol=1e-5)
    gradients = [
        jax.grad(lambda f, r=rank: jnp.sin(linear(r, *f)(x)).sum())((a, b)) for rank in (1, padded)
    ]
    for one, other in zip(*gradients):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
    # In half precision 1 + 0.0007 is 1: what is learned must not be added to the kernel.
    first = jnp.zeros((12, 1)).at[0].set(1.0)
    module = linear(padded, first, jnp.full((1, 20), 1e-3), jnp.bfloat16)
    module.kernel, module.bias = nnx.Param(jnp.ones((12, 20))), nnx.Param(jnp.zeros(20))
    learned = module((first - first[::-1]).T)  # rows of the kernel cancel, those of the adapter not
    np.testing.assert_allclose(learned.astype(jnp.float32), 0.7e-3, rtol=0.01)


def test_impossible_targets_are_refused():
    with pytest.raises(ValueError, match=r"LoRA targets \['attn.to_x', 'to_'\] match no linear"):
        shapes_of(LoRASpec(32, 64.0, ("to_", "attn.to_q", "attn.to_x")))
    with pytest.raises(ValueError, match=r"\['proj'\] match pos_embed.proj, a convolution in the"):
        shapes_of(LoRASpec(32, 64.0, ("proj",)))
