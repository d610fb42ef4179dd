"""Rewards with a gradient: of latents, of the colours of the shapes world, and in a run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from short_runs import load, rows

from flowgrpo_jax import compile, rewards, sharding
from flowgrpo_jax.assembly import parts, settings
from flowgrpo_jax.assembly.run import build_run
from flowgrpo_jax.configs import pickscore
from flowgrpo_jax.costs import program_shapes
from flowgrpo_jax.scoring import differentiable
from flowgrpo_jax.scoring.reward_weights import RewardWeights
from flowgrpo_jax.scoring.scorer import Scorer
from flowgrpo_jax.train import train
from flowgrpo_jax.types import GraphReward
from flowgrpo_jax.worlds.shapes import grammar
from flowgrpo_jax.worlds.shapes.render import COLORS, render

# ------------------------------------------------------------------------------------- the judge


def levels(vae, latents):
    return vae["scale"] * latents


def lengths(prompts, metadata):
    return {"length": np.array([len(prompt) for prompt in prompts], np.float32)}


def bright(weights, images, inputs):
    return weights["w"] * images.mean((1, 2, 3)) * inputs["length"]


def dark(weights, images, inputs):
    """A reward that fails, with a gradient that is not finite, for black images."""
    return -jnp.log(images.mean((1, 2, 3)))


REWARDS = {
    "bright": GraphReward({"w": np.float32(2)}, lengths, bright, differentiable=True),
    "dark": GraphReward({}, lengths, dark, differentiable=True),
}
RECORDS = [{"prompt": "a", "task": "one"}, {"prompt": "bbb", "task": "two"}]
LATENTS = jnp.stack([jnp.full((2, 2, 3), level) for level in (1.0, 3.0, 0.0)])
ROWS = jnp.array([0, 1, 1])  # each image's prompt


def judged(weights, texts=("{}",)):
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    scorer = Scorer(weights, REWARDS, RECORDS, mesh)
    inputs = differentiable.inputs(scorer, {"scale": 0.5}, np.arange(2), texts)
    judge = differentiable.judge(levels, scorer.trained)
    value = judge(inputs, LATENTS, ROWS)
    slope = jax.grad(lambda x: judge(inputs, x, ROWS)[0].sum())(LATENTS)
    return np.asarray(value), np.asarray(slope).sum((1, 2, 3))


def test_the_judge_is_the_weighted_sum_of_the_rewards():
    value, slope = judged(RewardWeights({"bright": 3.0, "dark": 0.0}))
    np.testing.assert_allclose(value, [[3 * 2 * 0.5 * 1, 3 * 2 * 1.5 * 3, 0]])
    np.testing.assert_allclose(slope, [3 * 1, 3 * 3, 3 * 3], rtol=1e-6)


def test_a_failed_score_counts_as_nothing_and_has_no_gradient():
    value, slope = judged(RewardWeights({"dark": 1.0}))
    np.testing.assert_allclose(value, [[-np.log(0.5), -np.log(1.5), 0]], rtol=1e-6)
    np.testing.assert_allclose(slope, [-1, -1 / 3, 0], rtol=1e-6)


def test_rewards_count_where_they_apply():
    tasks = {"one": {"bright": 1.0}, "two": {"dark": 1.0}}
    value, _ = judged(RewardWeights({"bright": 1.0, "dark": 1.0}, tasks))
    np.testing.assert_allclose(value, [[2 * 0.5, -np.log(1.5), 0]], rtol=1e-6)


def test_rewards_read_each_text():
    value, _ = judged(RewardWeights({"bright": 1.0}), ("{}", "as {}"))
    np.testing.assert_allclose(value, [[1, 9, 0], [4, 18, 0]])


def test_a_model_without_levels_is_refused():
    with pytest.raises(ValueError, match="has no `levels`, the decoder without rounding"):
        differentiable.judge(None, {})


# -------------------------------------------------------------------------- colours of the shapes


@pytest.fixture(scope="module")
def colors():
    return rewards.load(["shapes_colors"])["shapes_colors"]


def scores(reward, pictures, records):
    inputs = reward.prepare([r["prompt"] for r in records], records)
    return np.asarray(reward.score({}, jnp.asarray(pictures), inputs))


def test_words_of_a_prompt(colors):
    prompts = ["a red star and a blue square", "three circles", "Pink. an orange cross", "circle"]
    read = colors.prepare(prompts, [{}] * 4)
    named = [{COLORS[i] for i in np.flatnonzero(row)} for row in read["colors"]]
    assert named == [{"red", "blue"}, set(), {"pink", "orange"}, set()]
    np.testing.assert_array_equal(read["objects"], [2, 3, 1, 1])


@pytest.mark.parametrize("tag", ["colors", "color_attr"])
def test_true_pictures_score_above_those_of_prompts_with_other_colours(colors, tag):
    rng = np.random.default_rng(0)
    records = grammar.prompts("train", tag)
    records = [records[i] for i in rng.permutation(len(records))[:24]]
    pictures = np.stack([render(grammar.sample_scene(r, rng)) for r in records])
    named = [{c.get("color") for c in r["include"]} for r in records]
    own = scores(colors, pictures, records)
    assert own.min() > 0.6
    for shift in (1, 5):
        others = [(i + shift) % len(records) for i in range(len(records))]
        found = scores(colors, pictures[others], records)
        apart = np.array([named[i].isdisjoint(named[j]) for i, j in enumerate(others)])
        assert apart.any() and (found[apart] < 0.5).all()
        differs = np.array([named[i] != named[j] for i, j in enumerate(others)])
        assert (found < own)[differs].mean() > 0.95


def test_too_little_and_too_much_colour_score_less(colors):
    rng, record = np.random.default_rng(0), grammar.counting("circle", 2)
    two, four = (
        render(grammar.sample_scene(r, rng)) for r in (record, grammar.counting("circle", 4))
    )
    blank, full = np.full_like(two, 242), np.full_like(two, 20)
    found = scores(colors, np.stack([two, four, blank, full]), [record] * 4)
    assert found[0] > 0.85 and found[1] < 0.75 and found[2:].max() < 0.25


def test_the_gradient_of_the_colours_is_that_of_finite_differences(colors):
    rng, records = np.random.default_rng(0), grammar.prompts("train", "color_attr")[:2]
    pixels = rng.uniform(0, 255, (2, 8, 8, 3)).astype(np.float32)
    inputs = colors.prepare([r["prompt"] for r in records], records)
    check_gradient(lambda x: colors.score({}, x, inputs), pixels, step=0.5, rtol=1e-2)


def check_gradient(score, pixels, step, rtol):
    """Along the gradient itself, and in a direction of its own for each image."""
    slope = np.asarray(jax.grad(lambda x: score(x).sum())(jnp.asarray(pixels)))
    assert np.isfinite(slope).all() and (np.abs(slope).max((1, 2, 3)) > 0).all()
    size = np.sqrt(np.square(slope).sum((1, 2, 3), keepdims=True))
    along = slope / size / np.abs(slope / size).max((1, 2, 3), keepdims=True)
    up, down = (np.asarray(score(pixels + s * along), np.float64) for s in (step, -step))
    np.testing.assert_allclose((up - down) / (2 * step), (slope * along).sum((1, 2, 3)), rtol=rtol)


def test_black_and_blank_pictures_have_a_finite_gradient(colors):
    record = grammar.prompts("train", "colors")[0]
    inputs = colors.prepare([record["prompt"]] * 2, [record] * 2)
    pixels = jnp.stack([jnp.full((8, 8, 3), level) for level in (0.0, 240.0)])
    slope = jax.grad(lambda x: colors.score({}, x, inputs).sum())(pixels)
    assert np.isfinite(slope).all()


# --------------------------------------------------------------------------------------- in a run


def draft(runs, **changes):
    c = load(runs, eval__every=0, **changes)
    c.algorithm = ConfigDict({"name": "draft", "options": {"last": 2, "threshold": np.inf}})
    c.reward.weights = ConfigDict({"shapes_colors": 1.0, "jpeg_incompressibility": 0.0})
    c.checkpoint.best = ""
    return c


def test_in_a_run_the_reward_that_is_differentiated_is_the_one_that_is_scored(runs, tmp_path):
    """But for the rounding of pixels. Rewards on the host are logged beside it."""
    train(draft(runs, epochs=1, train__updates_per_epoch=1), tmp_path)
    (row,) = rows(tmp_path)
    assert row["grad_norm"] > 0 and row["failed"] == row["skipped"] == 0
    assert row["reward/jpeg_incompressibility"] > 0
    np.testing.assert_allclose(row["policy_loss"], -row["reward/shapes_colors"], atol=1e-3)


def test_rewards_without_a_gradient_are_refused(runs):
    config = draft(runs)
    config.reward.weights = ConfigDict({"shapes_colors": 1.0, "jpeg_incompressibility": 0.5})
    with pytest.raises(
        ValueError,
        match=r"reward.weights.jpeg_incompressibility: draft differentiates the rewards, and this"
        r" one is computed on the host. Choose from pickscore, .* with weight 0",
    ):
        build_run(config)


@pytest.mark.parametrize("knob, value", [("diversity", "latents"), ("transform", "exp")])
def test_what_changes_advantages_is_refused(runs, knob, value):
    config = draft(runs)
    config.advantage[knob] = value
    with pytest.raises(ValueError, match=rf"advantage\.{knob}='{value}': draft .* no advantage"):
        build_run(config)


def test_a_reward_in_the_graph_may_have_no_gradient():
    weights, reward = RewardWeights({"flat": 1.0}), REWARDS["bright"]
    flat = GraphReward(reward.weights, reward.prepare, reward.score)
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    with pytest.raises(ValueError, match=r"reward.weights.flat: .* this one has no gradient"):
        differentiable.check(Scorer(weights, {"flat": flat}, RECORDS, mesh), "draft")


def test_an_update_on_published_towers_is_described():
    """Ahead of time, by shapes alone: what the judge takes and returns for SD3.5 and PickScore."""
    config = pickscore.get_config("full")
    config.algorithm = ConfigDict({"name": "srpo", "options": {"threshold": np.inf}})
    settings.check(config)
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    model, algorithm = parts.describe_model(config, mesh), parts.make_algorithm(config)
    images = jax.ShapeDtypeStruct((2, 512, 512, 3), jnp.uint8)
    row = jax.ShapeDtypeStruct((2,), jnp.int32)
    scoring, _ = compile.score(config, mesh, (3, images, row), (3, images, row))
    vae = program_shapes.frozen(model, mesh)["vae"]
    judge, inputs = compile.differentiated(config, model, algorithm, 3, vae, scoring)
    latents = jax.ShapeDtypeStruct((2, 64, 64, 16), jnp.float32)
    found = jax.eval_shape(judge, inputs, latents, row)
    assert (found.shape, found.dtype) == ((2, 2), jnp.float32)
