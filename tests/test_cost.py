"""Arithmetic against counts by hand, and rewards that are described without their weights."""

import jax
import jax.numpy as jnp
import pytest
from counted_layers import LAYERS, ROWS, WIDTH, W, X, layers_loss

from flowgrpo_jax import compile, rewards, sharding
from flowgrpo_jax.configs import pickscore, shapes
from flowgrpo_jax.costs import cost
from flowgrpo_jax.rewards import towers
from flowgrpo_jax.types import Described, GraphReward

ONCE = 2 * LAYERS * ROWS * WIDTH * WIDTH


def count(f, *args):
    return cost.flops(jax.jit(f).trace(*args).jaxpr)


def test_products_in_loops_gradients_and_recomputation():
    """A gradient costs three forwards: with respect to the weights and to what came before.
    Recomputing the layers costs one more."""
    assert count(layers_loss, W, X) == ONCE
    assert count(jax.grad(layers_loss), W, X) == 3 * ONCE

    def recomputed(w, x):
        body = jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), None))
        return jnp.square(jax.lax.scan(body, x, w)[0]).sum()

    assert count(jax.grad(recomputed), W, X) == 4 * ONCE


@pytest.mark.parametrize(
    "name, parameters, work",
    [
        # open_clip's own profile of ViT-H-14 and ViT-L-14: millions of parameters, GFLOP a pair
        ("pickscore", 986.11e6, 381.68e9),
        ("clipscore", 427.62e6, 175.33e9),
    ],
)
def test_described_towers_are_the_published_ones(name, parameters, work):
    reward, wanted = rewards.describe([name, "ocr"], {})[name]
    assert sum(x.size for x in jax.tree.leaves(reward.weights)) == pytest.approx(
        parameters, rel=1e-4
    )
    images = jax.ShapeDtypeStruct((4, 512, 512, 3), jnp.uint8)
    prepared = {key: jax.ShapeDtypeStruct((4, *x.shape), x.dtype) for key, x in wanted.items()}
    # Ours resizes the picture as well, with two products: (224 x 512 + 224 x 224) x 512 x 3.
    resizing = 2 * 224 * 512 * 3 * (512 + 224)
    counted = count(reward.score, reward.weights, images, prepared)
    assert counted == pytest.approx(4 * (work + resizing), rel=2e-2)


def test_rewards_on_the_same_weights_are_described_once():
    """Of the recipe's towers three are CLIPs, one of them serves two rewards, and one is a BLIP."""
    config = pickscore.get_config("full")
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    images = jax.ShapeDtypeStruct((2, 512, 512, 3), jnp.uint8)
    batch = 1, images, jax.ShapeDtypeStruct((2,), jnp.int32)
    scoring, judging = compile.score(config, mesh, batch, batch)
    ((_, (trained, *_)),), ((_, (judged, *_)),) = scoring, judging
    assert set(trained) == {"pickscore"} and set(judged) == set(config.eval.rewards)

    def arrays(*weights):
        return {id(x) for x in jax.tree.leaves(weights)}

    assert arrays(trained) == arrays(judged["pickscore"])
    assert arrays(judged["clipscore"]) < arrays(judged["aesthetic"])
    assert not arrays(judged["pickscore"]) & arrays(judged["hpsv2"])
    no_towers = shapes.get_config()
    assert compile.score(no_towers, mesh, batch, batch) == ([], [])
    assert compile.undescribed(no_towers) == ["shapes", "shapes_strict", "shapes_unknown"]
    config.eval.every = 0  # training then loads no rewards for it
    assert len(compile.score(config, mesh, batch, batch)[0]) == 1
    assert compile.score(config, mesh, batch, batch)[1] == []


def tower(weights):
    prepare, score = towers.unprepared, lambda weights, images, rows: images @ weights
    return GraphReward(weights, prepare, score)


def on_host(images, prompts, metadata):
    raise AssertionError("called")


DESCRIBED = {"tower": lambda dtype: Described(tower(jax.ShapeDtypeStruct((3,), dtype)), {})}


def test_a_reward_of_the_user_s_own_is_described_by_its_module():
    name = f"{__name__}:tower()"
    options = {name: {"dtype": "bfloat16"}}
    found = rewards.describe([name, f"{__name__}:on_host", "ocr"], options)
    assert set(found) == {name} and found[name].reward.weights.dtype == jnp.bfloat16
    with pytest.raises(ValueError, match="only described"):
        found[name].reward.prepare(["a"], [{}])


def test_convolutions_and_conditions():
    image = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)
    kernel = jax.ShapeDtypeStruct((3, 3, 3, 5), jnp.float32)

    def conv(x, k):
        return jax.lax.conv_general_dilated(
            x, k, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    work = 2 * (2 * 8 * 8 * 5) * (3 * 3 * 3)
    assert count(conv, image, kernel) == work

    def either(flag, x, k):
        return jax.lax.cond(flag, lambda: conv(conv(x, k)[..., :3], k), lambda: conv(x, k))

    assert count(either, jax.ShapeDtypeStruct((), bool), image, kernel) == 2 * work


def test_a_loop_of_unknown_length_is_an_error():
    def f(x):
        return jax.lax.while_loop(lambda x: x.sum() < 1, lambda x: x @ x, x)

    with pytest.raises(ValueError, match="length is not known"):
        count(f, jax.ShapeDtypeStruct((4, 4), jnp.float32))
