"""The loss on data: its gradient, its sources, and runs that have it."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from linear_policy import KEY, SHAPE, close, flat, linear, unflat, weights
from PIL import Image
from scipy.optimize import approx_fprime
from short_runs import load, rows, same, timeless

from flowgrpo_jax import programs, sharding, update
from flowgrpo_jax.assembly import batch_plan
from flowgrpo_jax.models import sd3
from flowgrpo_jax.regularisation import training_data
from flowgrpo_jax.sampling import sampler, solvers
from flowgrpo_jax.train import train
from flowgrpo_jax.training import data_loss
from flowgrpo_jax.worlds.pretraining import data
from flowgrpo_jax.worlds.shapes.world import WORLD

LEVELS = jnp.asarray([0.9, 0.5, 0.2])


def gradient(params, x_0, noise, weight=1.0, velocity=linear):
    empty = jax.tree.map(jnp.zeros_like, params), jnp.zeros(())
    scale = 1 / (len(x_0) * len(LEVELS))
    return update.add_matching(velocity, params, (x_0, noise), LEVELS, scale, weight, empty)


def test_the_gradient_is_that_of_flow_matching_by_finite_differences():
    rng = np.random.default_rng(0)
    x_0, noise = rng.normal(size=(2, 3, *SHAPE))
    params = weights(0)

    def loss(theta):
        p, total = {k: np.asarray(x, np.float64) for k, x in unflat(theta).items()}, 0.0
        for s in np.asarray(LEVELS, np.float64):
            x = (1 - s) * x_0 + s * noise
            total += np.square(x @ p["w"] + s * p["b"] - (noise - x_0)).mean() / 3
        return total

    theta = flat(params).astype(np.float64)
    found, total = gradient(params, *map(partial(jnp.asarray, dtype=jnp.float32), (x_0, noise)))
    np.testing.assert_allclose(total, loss(theta), rtol=1e-5)
    np.testing.assert_allclose(flat(found), approx_fprime(theta, loss, 1e-6), rtol=2e-3, atol=1e-5)
    half, unweighted = gradient(params, x_0.astype("f"), noise.astype("f"), weight=0.5)
    close(half, jax.tree.map(lambda g: g / 2, found), rtol=1e-5)
    np.testing.assert_allclose(unweighted, total, rtol=1e-6)


def test_the_bases_own_samples_pull_nowhere():
    """The exact velocity of Gaussian data, E[noise - x_0 | x], is where the loss is least: what it
    draws by the ODE has a gradient of 0 but for the noise of the draws."""

    def exact(params, x, sigma):
        """Data of standard deviation exp(log_std) around the mean."""
        std, mean = jnp.exp(params["log_std"]), params["mean"]
        variance = (1 - sigma) ** 2 * std**2 + sigma**2
        slope = (sigma - (1 - sigma) * std**2) / variance
        return slope * (x - (1 - sigma) * mean) - mean

    base = {"log_std": jnp.log(0.7), "mean": jnp.array(0.4)}
    first, noise = jax.random.normal(KEY, (2, 40_000, 1, 1, 1))
    x_0 = sampler.ode(partial(exact, base), np.linspace(1, 0, 101), first)
    np.testing.assert_allclose([x_0.mean(), x_0.std()], [0.4, 0.7], atol=0.02)
    own, _ = gradient(base, x_0, noise, velocity=exact)
    other, _ = gradient(base, x_0 + 1.0, noise, velocity=exact)
    assert all(np.abs(g) < 0.03 for g in own.values())
    assert abs(other["mean"]) > 0.5


@pytest.mark.parametrize("slope, skipped", [(0.1, 0), (np.nan, 1)])
def test_a_step_of_the_data_that_is_skipped_is_a_figure(slope, skipped):
    def add_data(gradient, total, *_):
        return jax.tree.map(lambda g: g + slope, gradient), total

    optimiser = update.optimiser(0.1)
    made = SimpleNamespace(add_data=add_data, apply=programs.apply(optimiser, 0.9))
    run = SimpleNamespace(programs=made, put=lambda x: x, model=SimpleNamespace(base={}), empty={})
    alone = data_loss.EpochData([[()]], levels=LEVELS, own_step=True)
    state = update.init(weights(0), {}, {}, optimiser, KEY)
    after, figures = data_loss.step(run, alone, state, 0)
    assert figures == {"data_loss": 0, "data_skipped": skipped}
    assert int(after.step) == 1 - skipped


def test_two_devices_find_what_one_finds():
    """In a process of its own, for this one has a single device."""
    code = "import jax; jax.config.update('jax_num_cpu_devices', 2);"
    code += "import test_data_loss; test_data_loss.check_two_devices()"
    path = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])])
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": path}
    child = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr


def check_two_devices():
    """The programs of the base's samples and of the gradient, on meshes of one and two devices."""
    assert jax.device_count() == 2

    def guided(policy, frozen, x, sigma, cond, empty, rows):
        return linear(policy, x, sigma) + cond[rows][:, None, None]

    found = []
    for devices in (1, 2):
        mesh = sharding.make_mesh(devices=jax.devices()[:devices])
        draw = programs.draw_base(
            guided, mesh, latent=SHAPE, sigmas=(1.0, 0.5, 0.0), solver=solvers.EULER
        )
        add = programs.add_data(guided, images=4, weight=0.5)
        ids, places, rows = np.int32([[7, 7, 9, 9], [0, 1, 0, 1], [0, 0, 1, 1]])
        drawn = sharding.split_rows(mesh, (ids, places, rows))
        cond = sharding.replicate(mesh, np.float32([[0.1] * 3, [0.2] * 3]))
        policy, zero, key = sharding.replicate(
            mesh, (weights(0), jax.tree.map(jnp.zeros_like, weights(0)), KEY)
        )
        x_0 = draw(policy, {}, cond, cond, key, 5, *drawn)
        assert len(x_0.sharding.device_set) == devices
        found.append(
            add(zero, jnp.zeros(()), weights(1), {}, cond, cond, key, 5, LEVELS, x_0, *drawn)
        )
    close(*found, rtol=1e-5)
    assert float(found[0][1]) > 0


# ------------------------------------------------------------------------------- sources


def test_a_worlds_pictures_are_those_of_its_pretraining():
    source = training_data.load("shapes", 64, 64)
    pictures, captions = source(5, 3, 2)
    images, numbers = data.draw(WORLD, 5, np.random.default_rng([3, 2]))
    np.testing.assert_array_equal(pictures(), images)
    assert captions == [data.caption_table(WORLD)[i] for i in numbers]
    assert source(5, 3, 1).captions != captions
    assert training_data.load("shapes", 32, 48)(2, 0, 0).pixels().shape == (2, 32, 48, 3)
    assert training_data.load("base", 64, 64) is None


def paint(file, size=(6, 4), color=(255, 0, 0)):
    Image.new("RGB", size, color).save(file)


def test_a_folder_of_pictures_and_texts(tmp_path):
    for i, color in enumerate([(255, 0, 0), (0, 0, 255)]):
        paint(tmp_path / f"{i}.png", color=color)
        (tmp_path / f"{i}.txt").write_text(f"picture {i}\n", encoding="utf-8")
    source = training_data.load(str(tmp_path), 8, 8)
    pixels, captions = source(2, 0, 0)  # both of them, in some order
    assert sorted(captions) == ["picture 0", "picture 1"]
    for image, caption in zip(pixels(), captions):
        wanted = (255, 0, 0) if caption == "picture 0" else (0, 0, 255)
        np.testing.assert_array_equal(image, np.broadcast_to(wanted, (8, 8, 3)))
    assert len(source(5, 0, 0).captions) == 5
    (tmp_path / "1.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"1\.png has no caption: write it to 1\.txt"):
        training_data.load(str(tmp_path), 8, 8)


def test_a_folder_with_a_listing(tmp_path):
    paint(tmp_path / "a.png")
    listing = tmp_path / "metadata.jsonl"
    listing.write_text(json.dumps({"file_name": "a.png", "text": "red"}) + "\n")
    assert training_data.load(str(tmp_path), 4, 4)(1, 0, 0).captions == ["red"]
    for line, message in [
        ('{"file_name": "a.png"}', r'line 1 needs texts "file_name" and "text"'),
        ('{"file_name": "b.png", "text": "x"}', r"line 1: b\.png is not in"),
        ("[1]", r"line 1 is no object"),
    ]:
        listing.write_text(line)
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            training_data.load(str(tmp_path), 4, 4)


def test_what_is_no_source(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"is no folder: .* choose from 'base', 'shapes'"):
        training_data.load(str(tmp_path / "nothing"), 8, 8)
    with pytest.raises(FileNotFoundError, match=r"holds no picture: put NAME\.png and NAME\.txt"):
        training_data.load(str(tmp_path), 8, 8)
    (tmp_path / "a.png").write_text("no picture")
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(ValueError, match=r"a\.png cannot be read as a picture"):
        training_data.load(str(tmp_path), 8, 8)


def test_a_kind_of_model_that_reads_no_pictures():
    with pytest.raises(ValueError, match=r"this kind of model reads no pictures; choose 'base'"):
        programs.to_latents(None)


def test_latents_of_pictures_are_scaled():
    """The bundled autoencoder was scaled so that the latents of its pictures have mean 0 and
    standard deviation 1."""
    model = sd3.load("shapes")
    pixels = training_data.load("shapes", 64, 64)(8, 0, 0).pixels()
    latents = jax.jit(model.to_latents)(model.params["vae"], jnp.asarray(pixels))
    assert latents.shape == (8, *model.latent_shape(64, 64))
    np.testing.assert_allclose([latents.mean(), latents.std()], [0, 1], atol=0.1)


# ---------------------------------------------------------------------------------- runs


def with_data(runs, epochs, source="base", **options):
    c = load(runs, epochs=epochs, eval__every=0, train__updates_per_epoch=1)
    c.sample.micro_batch = 8
    c.data.source, c.data.images = source, 4
    c.data.update(options)
    return c


def test_a_run_goes_on_bit_for_bit(runs, tmp_path):
    """With a step of its own in every second epoch."""

    def config(epochs):
        return with_data(runs, epochs, "shapes", own_step=True, every=2)

    whole = train(config(2), tmp_path / "whole")
    train(config(1), tmp_path / "halves")
    resumed = train(config(2), tmp_path / "halves", resume=True)
    same(whole, resumed)
    found = rows(tmp_path / "whole")
    assert [*map(timeless, found)] == [*map(timeless, rows(tmp_path / "halves"))]
    assert ["data_loss" in row for row in found] == [False, True]
    assert found[1]["data_loss"] > 0 and int(whole.step) == 3


def test_a_weight_of_zero_is_plain_grpo(runs, tmp_path, monkeypatch):
    """Nothing of it is even built."""
    config = with_data(runs, 1, "folder/that/is/not/there", weight=0.0)
    plain = with_data(runs, 1, "")
    same(*(train(c, tmp_path / str(i)) for i, c in enumerate((config, plain))))
    assert "data_loss" not in rows(tmp_path / "0")[0]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"data.weight": -1.0}, r"data\.weight=-1\.0: must be at least 0"),
        ({"data.images": 9}, r"data\.images=9: .* choose from 1 to the 8 images of an update"),
        ({"data.images": 3}, r"data\.images=3 cannot be cut into the 2 equal parts"),
        ({"data.every": 0}, r"data\.every=0: .* must be at least 1"),
    ],
)
def test_numbers_that_are_wrong(runs, changes, message):
    config = with_data(runs, 1)
    config.update_from_flattened_dict(changes)
    with pytest.raises(ValueError, match=message):
        batch_plan.make_plan(config, 2)
