"""From prompts and noise to images: ours against the whole StableDiffusion3Pipeline."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from torch_models import PROMPTS, TOLERANCE, channels_first, channels_last, diffusers, worst

from flowgrpo_jax.models import convert, sd3
from flowgrpo_jax.models.sd3 import architecture
from flowgrpo_jax.sampling import sampler, sde

STEPS = 4


def ours(model, prompts, noise, guidance):
    """Final latents f32 [B, H, W, C] and images uint8."""
    velocity = sampler.guided(model.velocity, guidance)
    sigmas = model.sigmas(STEPS, 16, 16)
    rows = jnp.arange(len(prompts))

    @jax.jit
    def run(lora, weights, cond, empty, x):
        def v(x, sigma):
            return velocity(lora, weights["transformer"], x, sigma, cond, empty, rows)

        latents = sampler.ode(v, sigmas, x)
        return latents, model.decode(weights["vae"], latents).pixels

    lora = model.init_trained(jax.random.key(0))
    return run(lora, model.params, model.encode(prompts), model.encode([""]), noise)


def theirs(pipeline, prompts, noise, guidance, length):
    """The same from the pipeline, channels last."""
    height, width = (2 * n for n in noise.shape[1:3])
    settings = dict(
        negative_prompt=[""] * len(prompts),
        num_inference_steps=STEPS,
        guidance_scale=guidance,
        height=height,
        width=width,
        max_sequence_length=length,
    )
    kept = {}

    def keep(pipe, step, timestep, tensors):
        kept.update(tensors)
        return tensors

    images = pipeline(
        prompts, latents=channels_first(noise), callback_on_step_end=keep, **settings
    ).images
    return channels_last(kept["latents"]), np.stack([np.asarray(image) for image in images])


def noise_of(size, count):
    return np.random.default_rng(3).normal(size=(count, *size, 4)).astype(np.float32)


@pytest.mark.parametrize(
    "guidance, length, size", [(1.0, 8, (8, 8)), (4.5, 8, (8, 8)), (4.5, 128, (12, 6))]
)
def test_generation(checkpoint, pipeline, guidance, length, size):
    noise = noise_of(size, len(PROMPTS))
    wanted, wanted_images = theirs(pipeline, PROMPTS, noise, guidance, length)
    model = sd3.load(checkpoint, t5_length=length)
    latents, images = ours(model, PROMPTS, noise, guidance)
    assert worst(latents, wanted) <= TOLERANCE
    # A rounding border may lie between two values that differ in the seventh digit.
    differences = np.abs(np.asarray(images, int) - wanted_images)
    assert differences.max() <= 1 and (differences > 0).mean() < 0.001
    assert wanted_images.std() > 10  # and they show something


def test_the_inputs_matter(pipeline):
    """Prompt, guidance and text length each change the reference, so a mix-up would be seen."""
    noise = noise_of((8, 8), 1)
    base = theirs(pipeline, PROMPTS[:1], noise, 4.5, 8)[0]
    for prompt, guidance, length in (
        (PROMPTS[1], 4.5, 8),
        (PROMPTS[0], 1.0, 8),
        (PROMPTS[0], 4.5, 128),
    ):
        other = theirs(pipeline, [prompt], noise, guidance, length)[0]
        assert worst(other, base) > 100 * TOLERANCE


def test_without_t5(checkpoint, tmp_path):
    """A directory without the largest text encoder: zeros in its place, as the pipeline does."""
    shutil.copytree(checkpoint, tmp_path, dirs_exist_ok=True)
    for name in ("text_encoder_3", "tokenizer_3"):
        shutil.rmtree(tmp_path / name)
    pipeline = diffusers.StableDiffusion3Pipeline.from_pretrained(
        checkpoint, text_encoder_3=None, tokenizer_3=None
    )
    pipeline.set_progress_bar_config(disable=True)
    noise = noise_of((8, 8), 2)
    wanted, _ = theirs(pipeline, PROMPTS[:2], noise, 4.5, 8)
    latents, _ = ours(sd3.load(tmp_path, t5_length=8), PROMPTS[:2], noise, 4.5)
    assert worst(latents, wanted) <= TOLERANCE


@pytest.mark.parametrize("length", [1, 8, 20])
def test_t5_switched_off(checkpoint, length):
    """The same of a complete directory: zeros of T5's width and the length asked for."""
    pipeline = diffusers.StableDiffusion3Pipeline.from_pretrained(checkpoint, text_encoder_3=None)
    wanted, _, pooled, _ = pipeline.encode_prompt(
        PROMPTS, None, None, max_sequence_length=length, do_classifier_free_guidance=False
    )
    model = sd3.load(checkpoint, t5=False, t5_length=length)
    ours = model.encode(PROMPTS)
    assert worst(ours["tokens"], wanted) <= TOLERANCE and worst(ours["pooled"], pooled) <= TOLERANCE
    assert not np.asarray(ours["tokens"][:, -length:]).any()
    assert "text_encoder_3" not in model.text_shapes and model.tokenize.t5 is None
    kept = sd3.load(checkpoint, t5_length=length).encode(PROMPTS)
    assert kept["tokens"].shape == ours["tokens"].shape
    assert worst(kept["tokens"], wanted) > 100 * TOLERANCE


def test_t5_without_its_tokenizer(checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "tokenizer_3")
    with pytest.raises(
        FileNotFoundError, match=r"tokenizer_3 does not exist.*model\.options\.t5=False"
    ):
        sd3.load(tmp_path)
    assert sd3.load(tmp_path, t5=False).encode(["a cat"])["tokens"].shape[0] == 1


def test_what_the_directory_says(checkpoint):
    model = sd3.load(checkpoint)
    assert model.default_size == 16
    assert model.latent_shape(16, 24) == (8, 12, 4)
    with pytest.raises(ValueError, match="image size 16 x 18: both must be multiples of 4"):
        model.latent_shape(16, 18)


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0])
@pytest.mark.parametrize("steps", [1, 2, 4, 10, 28, 40, 50])
def test_sigma_schedule(steps, shift):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(steps)
    sigmas = sde.sigma_schedule(steps, shift)
    assert sigmas.dtype == np.float32
    np.testing.assert_allclose(sigmas, scheduler.sigmas.numpy(), rtol=1e-6, atol=0)
    np.testing.assert_allclose(1000 * sigmas[:-1], scheduler.timesteps.numpy(), rtol=1e-6)


def test_missing_parts_are_named(checkpoint, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"transformer/config.json does not exist"):
        sd3.load(tmp_path)
    with pytest.raises(FileNotFoundError, match="model directory '/nowhere' does not exist"):
        sd3.load("/nowhere")
    shutil.copytree(checkpoint, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "vae")
    with pytest.raises(FileNotFoundError, match=r"vae/config.json does not exist: .* no complete"):
        sd3.load(tmp_path)
    shutil.copytree(checkpoint, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "scheduler")
    with pytest.raises(FileNotFoundError, match=r"scheduler_config.json does not exist"):
        sd3.load(tmp_path)


def test_all_that_is_wrong_with_the_weights_is_said_before_any_is_read(
    checkpoint, tmp_path, monkeypatch
):
    """Also of the text encoders, which are read when the first prompt is encoded."""
    shutil.copytree(checkpoint, tmp_path, dirs_exist_ok=True)
    monkeypatch.setattr(convert, "load", lambda *args, **kwargs: pytest.fail("it was read"))
    for name, lost in (("transformer", "proj_out.bias"), ("text_encoder_3", "shared.weight")):
        (file,) = (tmp_path / name).glob("*.safetensors")
        tensors = load_file(file)
        del tensors[lost]
        save_file(tensors, file, metadata={"format": "pt"})
    (file,) = (tmp_path / "text_encoder").glob("*.safetensors")
    file.unlink()
    with pytest.raises(ValueError) as caught:
        sd3.load(tmp_path)
    for words in ("missing (1): proj_out.bias", "shared.weight", "lacks any .safetensors file"):
        assert words in str(caught.value)


@pytest.mark.parametrize("file", ["transformer/config.json", "scheduler/scheduler_config.json"])
def test_a_damaged_config_is_named(checkpoint, tmp_path, file):
    shutil.copytree(checkpoint, tmp_path, dirs_exist_ok=True)
    (tmp_path / file).write_text((tmp_path / file).read_text()[:-5])
    with pytest.raises(ValueError, match=f"{file} is damaged, copy or download it again"):
        sd3.load(tmp_path)


def test_a_transformer_of_one_block_needs_no_settings(checkpoint):
    """Its block, the last, lacks one of the linears that adapters are for by default."""
    parts = architecture.read(checkpoint)
    one = dataclasses.replace(parts.transformer, num_layers=1, dual_attention_layers=())
    assert sd3.describe(dataclasses.replace(parts, transformer=one)).base
