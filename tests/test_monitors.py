"""The monitors: figures of pictures by hand, and what an alarm does to a run."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from short_runs import load, rows

from flowgrpo_jax import sharding
from flowgrpo_jax.assembly.run import build_run
from flowgrpo_jax.checkpoints import policies
from flowgrpo_jax.checkpoints.checkpoint import Checkpoints
from flowgrpo_jax.monitors import embedding, move, picture_figures, true_loss
from flowgrpo_jax.sampling import sampler
from flowgrpo_jax.scoring.graph import GraphRewards
from flowgrpo_jax.train import initial_state, train
from flowgrpo_jax.training import alarms, lifecycle, run_evaluation
from flowgrpo_jax.types import GraphReward, PromptBatch


def flat(colour, side=16):
    return np.broadcast_to(np.array(colour, np.uint8), (side, side, 3)).copy()


def statistics(picture):
    return picture_figures.statistics(np.asarray(picture)[None])


def test_a_flat_picture_has_no_edges_and_one_colour():
    found = statistics(flat((255, 0, 0)))
    assert found["edge_density"] == found["colour_entropy"] == found["sharpness"] == 0
    assert found["saturation"] == 1
    assert found["brightness"] == pytest.approx(0.2126)
    assert statistics(flat((0, 0, 0)))["dark"] == statistics(flat((255, 255, 255)))["bright"] == 1
    assert statistics(flat((128, 128, 128)))["saturation"] == 0


def test_equal_shares_of_colours_have_the_entropy_of_their_number():
    picture = flat((0, 0, 0))
    picture[:8, :8], picture[:8, 8:], picture[8:, :8] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    assert statistics(picture)["colour_entropy"] == pytest.approx(2)


def test_edges_are_where_the_luma_jumps():
    """A vertical border between black and white lies in one of 15 columns of differences; the
    Laplacian of its two sides is -1 and 1, and 0 elsewhere."""
    picture = flat((0, 0, 0))
    picture[:, 8:] = 255
    found = statistics(picture)
    assert found["edge_density"] == pytest.approx(1 / 15)
    assert found["brightness"] == found["dark"] == found["bright"] == pytest.approx(0.5)
    assert found["sharpness"] == pytest.approx(np.sqrt(2 / 14), rel=1e-5)


def test_large_pictures_are_reduced():
    """Stripes of one pixel become grey at half of the size."""
    stripes = np.zeros((16, 2 * picture_figures.SIDE, 3), np.uint8)
    stripes[:, ::2] = 255
    found = statistics(stripes)
    assert found["edge_density"] == 0 and found["brightness"] == pytest.approx(0.5, abs=0.01)


def test_diversity_is_the_mean_distance_within_a_prompt():
    black, white, grey = flat((0, 0, 0)), flat((255, 255, 255)), flat((51, 51, 51))
    pictures, ids = np.stack([black, white, black, black, grey]), np.array([4, 9, 4, 9, 7])
    assert picture_figures.diversity(pictures, ids) == pytest.approx((0 + 1) / 2)
    three = np.stack([black, white, grey])
    assert picture_figures.diversity(three, np.zeros(3)) == pytest.approx((1 + 0.2 + 0.8) / 3)
    assert np.isnan(picture_figures.diversity(three, np.arange(3)))


def test_diversity_to_a_tower_is_one_less_the_cosine():
    x, y, between = np.eye(2)[0], np.eye(2)[1], np.full(2, np.sqrt(0.5))
    vectors, ids = np.stack([x, y, x, x, between]), np.array([4, 9, 4, 9, 7])
    assert embedding.diversity(vectors, ids) == pytest.approx((0 + 1) / 2)
    three = np.stack([x, y, between])
    expected = (1 + 2 * (1 - np.sqrt(0.5))) / 3
    assert embedding.diversity(three, np.zeros(3)) == pytest.approx(expected)
    assert np.isnan(embedding.diversity(three, np.arange(3)))


def mean_colour(weights, images):
    colour = images.astype(jnp.float32).mean((1, 2)) * weights
    return colour / jnp.linalg.norm(colour, axis=-1, keepdims=True)


def test_the_first_tower_that_is_loaded_embeds_the_pictures():
    """Five pictures in parts of two; rewards without a tower are passed over."""
    plain = GraphReward((), lambda *_: {}, lambda weights, images, rows: images[:, 0, 0, 0])
    seeing = dataclasses.replace(plain, weights=jnp.float32(2.0), embed=mean_colour)
    assert embedding.find([GraphRewards({}), GraphRewards({"plain": plain})]) is None
    tower = embedding.find([GraphRewards({"plain": plain}), GraphRewards({"seeing": seeing})])
    colours = [(255, 0, 0), (0, 9, 0), (0, 0, 30), (60, 80, 0), (0, 30, 40)]
    pixels = np.stack([flat(colour) for colour in colours])
    found = embedding.embeddings(*tower, pixels, sharding.make_mesh(), 2)
    expected = [(1, 0, 0), (0, 1, 0), (0, 0, 1), (0.6, 0.8, 0), (0, 0.6, 0.8)]
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_the_move_is_the_relative_distance_of_the_velocities():
    """Of v = a x the distance is (a / b - 1) ** 2, wherever the path leads."""
    sigmas = (1.0, 0.9, 0.5, 0.2, 0.0)

    def guided(scale, frozen, x, sigma, cond, empty, prompt):
        return scale * frozen * x

    mesh = sharding.make_mesh()
    measure = move.program(guided, mesh, (2, 2, 1), sigmas)
    places = jnp.arange(4)
    keys = sampler.image_keys(jax.random.key(0), 0, places, places)
    args = jnp.float32(2.0), None, None, places, keys
    found = measure(jnp.float32(1.5), jnp.float32(1.0), *args)
    np.testing.assert_allclose(found, [0.25] * 4, rtol=1e-5)
    np.testing.assert_allclose(measure(jnp.float32(1.0), jnp.float32(1.0), *args), 0)
    named = move.figures(np.array([1.0, 2.0, 3.0, 4.0]), sigmas)
    assert named == {"move_high": 1.5, "move_middle": 3.0, "move_low": 4.0}


def test_the_move_is_from_the_base_also_after_a_reset_of_the_reference(runs):
    changes = {"algorithm__options__kl_beta": 0.04, "kl__name": "constant", "kl__reset_every": 1}
    run = build_run(load(runs, **changes))
    state = initial_state(run)
    policy = jax.tree.map(lambda x: x + 0.1, state.policy)
    state = state.replace(policy=policy, copies={name: policy for name in state.copies})
    assert "reference" in state.copies
    found = run_evaluation.moved(run, state, PromptBatch(["a circle"], [{}], np.zeros(1, int)))
    assert all(size > 0 for size in found.values())


def test_the_loss_of_true_pictures_is_that_of_the_flow():
    """Pictures whose latents are 0: there the velocity x / sigma is the noise, which is exact; one
    that is 0.5 more costs 0.25. A velocity of 0 costs E (noise - z) ** 2 = 1 + z ** 2."""
    mesh, places = sharding.make_mesh(), jnp.arange(64)
    keys = sampler.image_keys(jax.random.key(0), 0, places, places)

    def guided(extra, frozen, x, sigma, cond, empty, prompt):
        return frozen * x / sigma + extra

    def loss(z, extra, frozen):
        measure = true_loss.program(guided, lambda vae, images: vae + 0 * images[..., :1], mesh)
        pixels = np.zeros((64, 8, 8, 3), np.uint8)
        return np.asarray(measure(extra, frozen, z, pixels, None, None, places, keys))

    np.testing.assert_allclose(loss(3.0, 0.0, 0.0).mean(), 1 + 9, rtol=0.03)
    np.testing.assert_allclose(loss(0.0, 0.0, 1.0), 0, atol=1e-10)
    np.testing.assert_allclose(loss(0.0, 0.5, 1.0), 0.25, rtol=1e-4)


def test_true_pictures_come_from_a_folder_or_a_function(tmp_path):
    for name, size in (("a", (20, 10)), ("b", (8, 8))):
        Image.new("RGB", size, "red").save(tmp_path / f"{name}.png")
    (tmp_path / "a.txt").write_text("a red wall\n")
    (tmp_path / "b.txt").write_text("a square")
    shown, texts = true_loss.load(str(tmp_path), 8, 16)
    assert shown.shape == (2, 8, 16, 3) and texts == ["a red wall", "a square"]
    assert (shown == (255, 0, 0)).all()
    box = "flowgrpo_jax.worlds.shapes.world:true_pictures"
    shown, texts = true_loss.load(box, 64, 64)
    assert shown.shape == (32, 64, 64, 3) and len(set(texts)) == 32
    with pytest.raises(ValueError, match=r"pictures='.*gone': there is no such folder"):
        true_loss.load(str(tmp_path / "gone"), 8, 16)
    (tmp_path / "b.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"b\.png has no caption: write it to b\.txt"):
        true_loss.load(str(tmp_path), 8, 8)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"gives no picture: a folder needs NAME\.png"):
        true_loss.load(str(tmp_path / "empty"), 8, 8)


def test_an_alarm_stops_the_run_and_the_last_good_state_is_kept(runs, tmp_path, monkeypatch):
    """The pictures turn dark at the third evaluation. The run can go on in spite of it."""
    levels = iter([0.5, 0.49, 0.1, 0.1, 0.1])
    monkeypatch.setattr(
        "flowgrpo_jax.monitors.picture_figures.statistics",
        lambda pixels: {"brightness": next(levels)},
    )
    tower = (mean_colour, jnp.float32(1.0))
    monkeypatch.setattr("flowgrpo_jax.monitors.embedding.find", lambda rewards: tower)
    settings = {"log__tensorboard": False, "eval__every": 1, "epochs": 3, "monitor__move": True}
    settings["monitor__pictures"] = "flowgrpo_jax.worlds.shapes.world:true_pictures"
    with pytest.raises(lifecycle.RunFailed, match=r"alarm at epoch 2: Brightness fell.*good"):
        train(load(runs, **settings, monitor__on_alarm="stop"), tmp_path)
    assert Checkpoints(tmp_path / "good").steps() == [1]
    last = rows(tmp_path)[-1]
    assert last["epoch"] == 2 and last["monitor/brightness"] == 0.1 and "reward" not in last
    assert last["monitor/true_loss"] != rows(tmp_path)[0]["monitor/true_loss"] > 0
    assert 0 < last["monitor/move_high"] < 1 and rows(tmp_path)[0]["monitor/move_high"] == 0
    assert '"level": "alarm"' in (tmp_path / "report.html").read_text()
    built = build_run(load(runs), training=False)
    assert policies.load(tmp_path / "good", built.model).keys() == built.model.trained_shapes.keys()
    train(load(runs, **settings), tmp_path, resume=True)
    assert [row["epoch"] for row in rows(tmp_path)] == [0, 1, 2, 3]


def test_an_alarm_raises_the_kl_also_after_a_restart(runs, tmp_path, monkeypatch):
    levels = iter([0.5, 0.1, 0.1, 0.1])
    monkeypatch.setattr(
        "flowgrpo_jax.monitors.picture_figures.statistics",
        lambda pixels: {"brightness": next(levels)},
    )
    settings = {"log__tensorboard": False, "monitor__on_alarm": "raise_kl", "eval__every": 1}
    train(load(runs, epochs=2, **settings), tmp_path)
    first, second, last = rows(tmp_path)
    assert first["kl"] == 0 < second["kl"]
    assert [row["monitor/alarms"] for row in (first, second, last)] == [0, 1, 1]
    seen = []
    made = alarms.with_options
    monkeypatch.setattr(alarms, "with_options", lambda run, o: seen.append(o) or made(run, o))
    train(load(runs, epochs=3, **settings | {"eval__every": 2}), tmp_path, resume=True)
    assert seen == [{"kl_beta": 0.08}]  # for epoch 1's alarm and that of epoch 2
    assert rows(tmp_path)[2]["kl"] > 0


def test_only_what_has_a_kl_can_raise_it(runs):
    config = load(runs, monitor__on_alarm="raise_kl", lora__rank=0)
    with pytest.raises(ValueError, match=r"raise_kl.*lora.rank=0: choose 'stop'"):
        build_run(config)
