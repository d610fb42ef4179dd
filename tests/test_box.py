"""The model in the box: diffusers draws the same with it, and its autoencoder keeps what counts."""

import json

import jax
import numpy as np
import pytest

from flowgrpo_jax import sampler, sde
from flowgrpo_jax.generate import t5_limit
from flowgrpo_jax.models import sd3
from flowgrpo_jax.pretraining import vae
from flowgrpo_jax.shapes import grammar
from flowgrpo_jax.shapes.render import render
from flowgrpo_jax.shapes.verify import judge

DIRECTORY = sd3.resolve("shapes")
SCENES_PER_TAG = 50


def test_it_is_small_enough_to_come_along():
    assert sum(file.stat().st_size for file in DIRECTORY.rglob("*") if file.is_file()) < 16e6


def test_the_autoencoder_keeps_what_the_verifier_reads():
    rng = np.random.default_rng(0)
    asked = []
    for tag in grammar.TAGS:
        pool = grammar.prompts("all", tag)
        asked += [pool[i] for i in rng.integers(len(pool), size=SCENES_PER_TAG)]
    pictures = np.stack([render(grammar.sample_scene(metadata, rng)) for metadata in asked])

    model = sd3.load("shapes", t5_length=t5_limit(DIRECTORY))
    settings = json.loads((DIRECTORY / "vae" / "config.json").read_text())
    means = vae.encode_all(model.params["vae"], pictures, batch=100)
    latents = (means - settings["shift_factor"]) * settings["scaling_factor"]
    decode = jax.jit(model.decode)
    parts = [decode(model.params["vae"], part) for part in np.split(latents, 3)]

    def strict(images):
        return np.mean([judge(image, m).strict for image, m in zip(images, asked, strict=True)])

    assert strict(pictures) >= 0.99
    assert strict(np.concatenate(parts)) >= 0.97
    assert abs(latents.mean()) < 0.1 and abs(latents.std() - 1) < 0.1  # as the transformer expects


def test_diffusers_draws_the_same_with_it():
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    prompts, steps, length = ["a red circle", "a star above a cross"], 2, t5_limit(DIRECTORY)
    noise = np.random.default_rng(0).normal(size=(2, 8, 8, 16)).astype(np.float32)

    pipe = diffusers.StableDiffusion3Pipeline.from_pretrained(DIRECTORY, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    theirs = pipe(
        prompts,
        latents=torch.from_numpy(noise.transpose(0, 3, 1, 2)),
        num_inference_steps=steps,
        guidance_scale=1.0,
        height=64,
        width=64,
        max_sequence_length=length,
        output_type="np",
    ).images

    model = sd3.load(DIRECTORY, t5_length=length)
    lora, cond = model.init_lora(jax.random.key(0)), model.encode(prompts)
    guided = sampler.guided(model.velocity, 1.0)

    def velocity(x, sigma):
        return guided(lora, model.base, x, sigma, cond, None, np.arange(2))

    end = sampler.ode(velocity, sde.sigma_schedule(steps, model.shift), noise)
    np.testing.assert_allclose(model.decode(model.params["vae"], end) / 255, theirs, atol=0.6 / 255)
