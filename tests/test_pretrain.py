"""Pretraining of the small models: it resumes, and reads back what it wrote."""

import dataclasses
import os
import signal
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, stats
from tiny_model import draw

from flowgrpo_jax.checkpoints.checkpoint import Checkpoints
from flowgrpo_jax.command_line.stop import Stopped
from flowgrpo_jax.models import directories, layers, sd3
from flowgrpo_jax.models.sd3 import architecture
from flowgrpo_jax.models.text import CLIPConfig, T5Config
from flowgrpo_jax.worlds.pretraining import data, flow, package, vae
from flowgrpo_jax.worlds.pretraining import run as pretrain
from flowgrpo_jax.worlds.shapes import verify
from flowgrpo_jax.worlds.shapes.world import WORLD
from flowgrpo_jax.worlds.signs import world as signs


def walk(state, x, key):
    """A step whose end depends on every batch before it, in order."""
    total = 0.9 * state["total"] + jnp.float32(x)
    return {"total": total, "step": state["step"] + 1}, (total,)


def run(workdir, step=walk):
    start = {"total": jnp.float32(0), "step": jnp.int32(0)}
    return pretrain.loop("toy", workdir, start, step, lambda rng: (rng.normal(),), steps=7, seed=3)


def test_an_interrupted_run_ends_as_an_uninterrupted_one(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain, "SAVE_AFTER", 0.0)

    def dies(state, x, key):
        if int(state["step"]) == 5:
            raise KeyboardInterrupt
        return walk(state, x, key)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", dies)
    resumed, whole = run(tmp_path / "killed"), run(tmp_path / "whole")
    assert int(resumed["step"]) == 7
    assert resumed["total"] == whole["total"] != 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_told_to_stop_loses_nothing(tmp_path, number):
    def is_told(state, x, key):
        if int(state["step"]) == 4:
            os.kill(os.getpid(), number)
        return walk(state, x, key)

    with pytest.raises(Stopped):
        run(tmp_path / "stopped", is_told)
    assert Checkpoints(tmp_path / "stopped" / "toy-checkpoints").steps() == [5]
    assert run(tmp_path / "stopped")["total"] == run(tmp_path / "whole")["total"]


def test_a_cache_that_was_not_finished_is_not_there(tmp_path):
    def dies(file):
        file.write(b"half of it")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        data.write_whole(tmp_path / "latents.npy", dies)
    assert not (tmp_path / "latents.npy").exists()
    data.write_whole(tmp_path / "latents.npy", lambda file: np.save(file, np.arange(3)))
    np.testing.assert_array_equal(np.load(tmp_path / "latents.npy"), np.arange(3))


def drawn(create, seed):
    """Random parameters, as `layers.initialise` gives them, but without compiling anything."""
    return draw(layers.abstract(create)[1], np.random.default_rng(seed))


def test_random_parameters_depend_on_the_seed_alone():
    def create(rngs):
        return layers.Linear(300, 500, dtype=jnp.float32, rngs=rngs)

    one, again, other = (layers.initialise(create, seed)["kernel"] for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, again)
    assert abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < 0.01
    limit = (6 / 800) ** 0.5  # Glorot and Bengio 2010, equation 16
    assert stats.kstest(one.ravel(), stats.uniform(-limit, 2 * limit).cdf).pvalue > 0.01


def test_what_is_written_is_read_back(tmp_path):
    directory = directories.resolve("shapes")
    clip_l, clip_g = (
        architecture.config(directory, name, CLIPConfig)
        for name in ("text_encoder", "text_encoder_2")
    )
    t5 = architecture.config(directory, "text_encoder_3", T5Config)
    modules = {**flow.makers(clip_l, clip_g, t5), "vae": vae.create}
    params = {name: drawn(create, seed=1) for name, create in modules.items()}
    package.write(tmp_path, params, flow.TRANSFORMER, vae.CONFIG, clip_l, clip_g, t5)
    again = package.read(tmp_path, modules)
    for name, part in params.items():
        assert part.keys() == again[name].keys()
        for path, value in part.items():
            half = np.asarray(value).astype(np.float16).astype(np.float32)
            np.testing.assert_array_equal(np.asarray(again[name][path]), half)


def test_data_is_repeatable_and_careless_by_a_fixed_share():
    one, two = data.chunk(WORLD, 0, 0), data.chunk(WORLD, 0, 0)
    np.testing.assert_array_equal(one[0], two[0])
    np.testing.assert_array_equal(one[1], two[1])
    assert (data.chunk(WORLD, 0, 1)[0] != one[0]).any()
    records = WORLD.captions()
    wrong = [not verify.judge(image, records[i]).strict for image, i in zip(*one)]
    # A binomial of 1000 with share `garbled` stays within four standard deviations.
    share = WORLD.garbled
    assert abs(np.mean(wrong) - share) < 4 * (share * (1 - share) / 1000) ** 0.5 + 0.01
    assert max(one[1]) < len(data.caption_table(WORLD))


def test_a_batch_has_a_noise_level_in_every_share_of_their_distribution():
    levels = np.asarray(flow.sigmas(jax.random.key(3), 128), np.float64)
    share = stats.norm(loc=np.log(flow.SHIFT)).cdf(np.log(levels / (1 - levels)))
    np.testing.assert_array_equal(np.sort(np.floor(128 * share)), np.arange(128))
    assert stats.kstest(128 * share % 1, "uniform").pvalue > 0.01


def test_the_flow_loss_is_zero_for_the_velocity_from_picture_to_noise(monkeypatch):
    monkeypatch.setattr(flow, "encode_prompt", lambda *states: (None, None))
    latents = jax.random.normal(jax.random.key(1), (64, 8, 8, 16))
    params = dict.fromkeys(["text_encoder", "text_encoder_2", "text_encoder_3", "transformer"])

    def loss(velocity):
        def transformer(params, x, t, tokens, pooled):
            return velocity(x, t[:, None, None, None] / 1000)

        apply = {name: lambda params, ids: None for name in params}
        apply["transformer"] = transformer
        return float(flow.loss(apply, params, latents, (None,) * 3, jax.random.key(2)))

    assert loss(lambda x, sigma: (x - latents) / sigma) < 1e-6  # x = latents + sigma v
    assert loss(lambda x, sigma: (latents - x) / sigma) == pytest.approx(4 * 2, rel=0.05)
    assert loss(lambda x, sigma: 0 * x) == pytest.approx(2, rel=0.05)  # of noise and of latents


def test_the_autoencoder_s_loss_is_the_error_and_the_divergence_from_a_normal():
    mean, logvar, images = np.array([[0.3, -1.2]]), np.array([[-1.0, 0.5]]), np.array([[0.1, 0.9]])

    def apply(params, x, method):
        return (jnp.asarray(mean), jnp.asarray(logvar)) if method == "encode" else 0.5 + 0 * x

    total, (mse, kl) = vae.loss(apply, {}, jnp.asarray(images), jax.random.key(0), 0.25)

    def divergence(m, s):
        p, q = stats.norm(m, s), stats.norm()
        return integrate.quad(lambda x: p.pdf(x) * (p.logpdf(x) - q.logpdf(x)), -12, 12)[0]

    wanted = np.mean([divergence(m, np.exp(v / 2)) for m, v in zip(mean[0], logvar[0])])
    np.testing.assert_allclose([mse, kl], [0.16, wanted], rtol=1e-4)
    np.testing.assert_allclose(total, 0.4 + 0.16 + 0.25 * wanted, rtol=1e-4)


def test_latents_are_scaled_as_the_model_s_config_says(tmp_path, monkeypatch):
    made = 3 + 5 * np.random.default_rng(0).normal(size=(12, 8, 8, 16)).astype(np.float32)
    monkeypatch.setattr(vae, "encode_all", lambda params, images: made)
    args = SimpleNamespace(workdir=tmp_path, seed=0, pictures=12)
    pictures = data.Dataset(np.zeros((12, 64, 64, 3), np.uint8), np.zeros(12, np.int32))
    for _ in range(2):  # made, and from the cache
        scaled, config = pretrain.encoded(args, {}, pictures)
        np.testing.assert_allclose([scaled.mean(), scaled.std()], [0, 1], atol=1e-3)
        # As diffusers decodes: latents / scaling_factor + shift_factor.
        back = scaled / config.scaling_factor + config.shift_factor
        np.testing.assert_allclose(back, made, atol=1e-4)


@pytest.mark.parametrize(
    "option, problem, message",
    [
        ("--pictures=15", ValueError, "--pictures=15: must be a multiple of 12"),
        ("--pictures=0", ValueError, "--pictures=0: must be a multiple of 12"),
        ("--garbled=20", ValueError, r"--garbled=20\.0: a share of captions"),
        ("--start_from=nowhere", FileNotFoundError, r"nowhere holds no model_index\.json"),
    ],
)
def test_a_typing_error_does_not_bind_the_directory(
    tmp_path, monkeypatch, option, problem, message
):
    monkeypatch.setattr(data, "CHUNK", 12)
    monkeypatch.setattr(sys, "argv", ["pretrain", f"--workdir={tmp_path / 'run'}", option])
    with pytest.raises(problem, match=message):
        pretrain.main(WORLD)
    assert not (tmp_path / "run").exists()


@pytest.fixture
def small(monkeypatch):
    """Models of as few layers as load; the autoencoder stays as it was drawn, which compiles least.

    How that is trained does not depend on the world.
    """

    def wait(state, images, key):
        return state | {"step": state["step"] + 1}, ()

    def latents(params, images):
        return np.random.default_rng(0).normal(size=(len(images), 8, 8, 16)).astype(np.float32)

    clip, t5, replace = flow.clip_config, flow.t5_config, dataclasses.replace
    blocks = replace(flow.TRANSFORMER, num_layers=2, dual_attention_layers=())
    monkeypatch.setattr(flow, "TRANSFORMER", blocks)
    monkeypatch.setattr(flow, "clip_config", lambda *x: replace(clip(*x), num_hidden_layers=1))
    monkeypatch.setattr(flow, "t5_config", lambda *x: replace(t5(*x), num_layers=1))
    monkeypatch.setattr(vae, "train_step", lambda steps: wait)
    monkeypatch.setattr(vae, "encode_all", latents)
    monkeypatch.setattr(layers, "initialise", drawn)
    monkeypatch.setattr(data, "CHUNK", 12)


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_that_gives_the_numbers_of_another_is_refused(small, tmp_path, monkeypatch, seed):
    options = [f"--workdir={tmp_path / 'run'}", "--pictures=12", f"--seed={seed}"]
    monkeypatch.setattr(sys, "argv", ["pretrain", *options])
    with pytest.raises(ValueError, match=f"--seed={seed}: must be at least 0 and at most"):
        pretrain.main(signs.WORLD)
    assert not (tmp_path / "run").exists()


def test_two_steps_make_a_model_that_loads(small, tmp_path, monkeypatch):
    images, captions = data.chunk(signs.WORLD, 0, 0)
    np.savez(tmp_path / "pictures-0-12.npz", images=images, captions=captions)
    options = ["--pictures=12", "--vae_steps=2", "--flow_steps=2", "--batch=2"]
    monkeypatch.setattr(sys, "argv", ["pretrain", f"--workdir={tmp_path}", *options])
    pretrain.main(signs.WORLD)

    model = sd3.load(tmp_path / "model", t5_length=signs.WORLD.length)
    assert model.default_size == 64
    assert all(np.isfinite(x).all() for part in model.params.values() for x in part.values())
    assert model.tokenize(['a sign that says "CAT"'])[0].shape == (1, signs.WORLD.length)

    pretrain.main(signs.WORLD)  # nothing is left to do
    for other, named in (("--seed=1", "seed 0 -> 1"), ("--flow_steps=3", "flow_steps 2 -> 3")):
        monkeypatch.setattr(sys, "argv", ["pretrain", f"--workdir={tmp_path}", *options, other])
        with pytest.raises(ValueError, match=f"another pretraining run .*{named}"):
            pretrain.main(signs.WORLD)
    monkeypatch.setattr(sys, "argv", ["pretrain", f"--workdir={tmp_path}", *options])
    with pytest.raises(ValueError, match="world signs -> shapes"):
        pretrain.main(WORLD)
