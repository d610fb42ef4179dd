"""A made-up kind of model that shares no part with SD3: a perceptron a pixel, a bag of letters, and
guidance as an input of the network. Nothing in the package knows it."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import load_file, save_file

from flowgrpo_jax import sharding
from flowgrpo_jax.models import Family, Model, layers, lora
from flowgrpo_jax.models.layers import Linear
from flowgrpo_jax.models.lora import LoRASpec
from flowgrpo_jax.models.vae import to_pictures

CHANNELS, WIDTH, LETTERS, SCALE = 4, 24, 12, 4
RULES = (*sharding.cut_storage("inner|outer|paint"), *sharding.cut_table("letters"))


class Denoiser(nnx.Module):
    def __init__(self, width, dtype, rngs):
        self.inner = Linear(CHANNELS + WIDTH + 2, width, dtype=dtype, rngs=rngs)
        self.outer = Linear(width, CHANNELS, dtype=dtype, rngs=rngs)

    def __call__(self, x, sigma, guidance, words):
        b, h, w, _ = x.shape
        given = jnp.concatenate([words, sigma[:, None], guidance[:, None]], axis=-1)
        given = jnp.broadcast_to(given[:, None, None], (b, h, w, given.shape[-1]))
        return self.outer(jnp.tanh(self.inner(jnp.concatenate([x, given], axis=-1))))


class Painter(nnx.Module):
    def __init__(self, rngs):
        self.paint = Linear(CHANNELS, 3, dtype=jnp.float32, rngs=rngs)

    def __call__(self, latents):
        return self.paint(latents).repeat(SCALE, axis=1).repeat(SCALE, axis=2)


class Reader(nnx.Module):
    def __init__(self, rngs):
        self.letters = nnx.Embed(128, WIDTH, rngs=rngs)

    def __call__(self, ids):
        return self.letters(ids).mean(1)


def tokenize(prompts):
    return np.array([[ord(c) % 128 for c in p.ljust(LETTERS)[:LETTERS]] for p in prompts])


def latent_shape(height, width):
    if height % SCALE or width % SCALE:
        raise ValueError(f"image size {height} x {width}: both must be multiples of {SCALE} px")
    return height // SCALE, width // SCALE, CHANNELS


def describe(model, *, lora_spec=None, dtype=jnp.float32, width=32, **_):
    spec = lora_spec or LoRASpec(1, 1.0, ("inner",))

    def adapted(rngs):
        module = Denoiser(width, dtype, rngs)
        if spec.rank:
            lora.add(module, spec)
        return module

    denoise, shapes = layers.abstract(adapted)
    paint, painter = layers.abstract(Painter)
    read, reader = layers.abstract(Reader)
    adapter, base = lora.split(shapes)

    def velocity(trained, frozen, x, sigma, words, guidance):
        return denoise({**frozen, **trained}, x, sigma, guidance, words["words"])

    return Model(
        params={"transformer": base, "vae": painter},
        velocity=velocity,
        decode=lambda params, z: to_pictures(paint(params, z)),
        encode_text=lambda params, ids: {"words": read(params["reader"], ids)},
        token_shapes=lambda n: jax.ShapeDtypeStruct((n, LETTERS), jnp.int32),
        sigmas=lambda steps, height, width: np.linspace(1, 0, steps + 1) ** (height / width),
        latent_shape=latent_shape,
        trained_shapes=adapter if spec.rank else base,
        text_shapes={"reader": reader},
        lora_spec=spec,
        rules=RULES,
        heads=1,
        default_size=16,
        guidance="input",
    )


def load(model, *, place=None, texts_alone=False, **settings):
    described, folder = describe(model, **settings), Path(model)

    def read(component):
        arrays = load_file(folder / component / "diffusion_pytorch_model.safetensors")
        where = (lambda path, x: place(f"{component}/{path}", x)) if place else lambda *_: None
        return {path: jax.device_put(x, where(path, x)) for path, x in arrays.items()}

    return replace(
        described,
        params={name: read(name) for name in described.params} if not texts_alone else {},
        tokenize=tokenize,
        read_text=lambda: {"reader": read("reader")},
        text_files=lambda: [folder / "reader" / "diffusion_pytorch_model.safetensors"],
        directory=folder,
        name=str(model),
    )


def export(trained, model, out):
    file = Path(out) / "transformer" / "diffusion_pytorch_model.safetensors"
    file.parent.mkdir(parents=True)
    save_file({path: np.asarray(x) for path, x in trained.items()}, file)
    return file


FAMILY = Family(describe, load, export, RULES, ("inner", "outer"), {"width": 32})


def write_model(folder):
    """A model with random weights, in diffusers layout."""
    described, rng = describe(folder), np.random.default_rng(0)
    parts = {**described.params, **described.text_shapes}
    for name, shapes in parts.items():
        arrays = {path: rng.normal(size=x.shape) * 0.3 for path, x in shapes.items()}
        (folder / name).mkdir(parents=True)
        file = folder / name / "diffusion_pytorch_model.safetensors"
        save_file({path: x.astype(np.float32) for path, x in arrays.items()}, file)
        (folder / name / "config.json").write_text("{}")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "RipplePipeline"}))
