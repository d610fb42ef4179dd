"""The update replays what the sampler recorded, with a real transformer."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from grpo_update import SIGMAS, grpo
from linear_policy import draw

from flowgrpo_jax import update
from flowgrpo_jax.algorithms import Setup
from flowgrpo_jax.models import lora, sd3
from flowgrpo_jax.models.layers import functional
from flowgrpo_jax.models.sd3.mmdit import MMDiT, MMDiTConfig
from flowgrpo_jax.sampling import sampler, sde
from flowgrpo_jax.sampling.sampler import Process
from flowgrpo_jax.types import Credit


@pytest.fixture(scope="module")
def mmdit():
    """(velocity(adapter, base, x, sigma, text), adapter with random B, base)."""
    config = MMDiTConfig(
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        caption_projection_dim=16,
        pooled_projection_dim=10,
        pos_embed_max_size=4,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    module = nnx.eval_shape(lambda: MMDiT(config, rngs=nnx.Rngs(0)))
    lora.add(module, lora.LoRASpec(2, 4, sd3.JOINT_ATTENTION))
    apply, shapes = functional(module)
    rng = np.random.default_rng(0)
    params = {k: rng.normal(scale=0.3, size=s.shape).astype(np.float32) for k, s in shapes.items()}
    adapter = {k: jnp.asarray(v) for k, v in params.items() if "lora_" in k}
    base = {k: jnp.asarray(v) for k, v in params.items() if k not in adapter}

    @jax.jit
    def velocity(adapter, base, x, sigma, text):
        return apply({**base, **adapter}, x, 1000 * sigma, text["tokens"], text["pooled"])

    return velocity, adapter, base


@pytest.mark.parametrize("kernel, guidance", [("flow_sde", 4.5), ("cps", 1.0)])
def test_the_update_replays_what_the_sampler_recorded(mmdit, kernel, guidance):
    """Right after a rollout the ratio is 1, with a real transformer, guidance and adapter."""
    velocity, adapter, base = mmdit
    rng = np.random.default_rng(1)
    tokens, pooled = rng.normal(size=(3, 5, 12)), rng.normal(size=(3, 10))
    cond, empty = (
        {
            "tokens": jnp.asarray(tokens[s], jnp.float32),
            "pooled": jnp.asarray(pooled[s], jnp.float32),
        }
        for s in (slice(2), slice(2, 3))
    )
    process = Process(SIGMAS, sde.load(kernel), 0.7, window=3)
    algorithm = grpo(1e-4)
    prompt = jnp.array([0, 0, 1, 1])
    advantage = jnp.array([1.0, -1, 2, -0.5])
    guided = sampler.guided(velocity, guidance)

    def v(adapter, x, sigma):
        return guided(adapter, base, x, sigma, cond, empty, prompt)

    @jax.jit
    def rollout(adapter):
        return draw(partial(v, adapter), process, count=4, shape=(4, 4, 4))

    @jax.jit
    def replay(adapter, drawn):
        setup = Setup(process, 2)
        args = (algorithm, setup, v, adapter, {}, drawn, Credit(advantage))
        return update.accumulate(*args, jnp.arange(3), 4, update.empty(algorithm, setup, adapter))

    drawn = rollout(adapter)
    gradient, figures = replay(adapter, drawn)
    assert figures["ratio_gap"] < 1e-6
    assert figures["clip_fraction"] == 0 and figures["approx_kl"] < 1e-12
    np.testing.assert_allclose(figures["policy_loss"], -advantage.mean(), rtol=1e-5)
    # All of the adapter learns, but for the last block's text queries, whose output is dropped.
    idle = {path for path, g in gradient.items() if not g.any()}
    assert idle == {f"transformer_blocks/1:2/attn/add_q_proj/lora_{ab}" for ab in "ab"}

    moved = jax.tree.map(lambda a: 1.05 * a, adapter)
    assert replay(moved, drawn)[1]["ratio_gap"] > 1e-4
