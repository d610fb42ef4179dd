r"""Draw pictures of prompts, with the base model or a trained LoRA.

    python -m flowgrpo_jax.generate --model shapes --prompt "a red circle above a blue square"
    python -m flowgrpo_jax.generate --model DIR --lora EXPORT --prompt TEXT --steps 40 \
        --guidance 4.5 --seed 0 --out picture.png
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from PIL import Image

from flowgrpo_jax import models, programs, seeds, sharding
from flowgrpo_jax.assembly import batch_plan, settings
from flowgrpo_jax.checkpoints import checkpoint, policies
from flowgrpo_jax.command_line import cli
from flowgrpo_jax.models import Family, Model, attention, decoding, lora_files, quantised
from flowgrpo_jax.models.lora import LoRASpec
from flowgrpo_jax.sampling import sampler, solvers
from flowgrpo_jax.storage import outputs
from flowgrpo_jax.types import Params

log = logging.getLogger(__name__)


def generate(
    model: Model,
    adapter: Params,
    prompts: list[str],
    *,
    steps: int = 40,
    solver: str = "euler",
    guidance: float = 4.5,
    seed: int = 0,
    height: int | None = None,
    width: int | None = None,
) -> np.ndarray:
    """Draw one image a prompt by the deterministic ODE: uint8 [n, height, width, 3].

    A guidance of at most 1 means none. Raises ValueError for a negative one and for NaN, and for a
    seed that is not from 0 to 2^32 - 1.
    """
    seeds.check("seed", seed)
    scale = settings.guidance(guidance, "guidance", model.guidance)
    height, width = height or model.default_size, width or model.default_size
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    run = programs.generate(
        sampler.guided(model.velocity, scale, model.guidance),
        decoding.in_parts(model.decode, mesh, decoding.automatic(height, width)),
        mesh,
        latent=model.latent_shape(height, width),
        sigmas=tuple(map(float, model.sigmas(steps, height, width))),
        solver=solvers.load(solver),
    )
    weights = {"transformer": model.base, "vae": model.params["vae"]}
    empty, n = model.encode([""]), len(prompts)
    most = batch_plan.AT_ONCE // (height * width)
    at_once = min(n, max(most, 1))
    padded = np.arange(-(-n // at_once) * at_once) % n  # static shapes
    images, finite = [], []
    for part in np.split(padded, len(padded) // at_once):
        place = jnp.asarray(part)
        keys = sampler.image_keys(jax.random.key(seed), 0, place, jnp.zeros_like(place))
        cond = model.encode([prompts[i] for i in part])
        pictures = run(adapter, weights, cond, empty, jnp.arange(at_once), keys)
        images.append(np.asarray(pictures.pixels))
        finite.append(np.asarray(pictures.finite))
    for i in np.flatnonzero(~np.concatenate(finite)[:n]):
        log.warning("the picture of %r has pixels that are not finite", prompts[i])
    return np.concatenate(images)[:n]


def read_spec(path: str | Path) -> LoRASpec:
    """Read rank, alpha and targets of an exported LoRA; for a run the error says how to export."""
    try:
        return lora_files.read_spec(path).spec
    except FileNotFoundError as error:
        path = Path(path)
        run = next((p for p in (path, *path.parents[:2]) if _is_run(p)), None)
        if run is None:
            raise
        raise FileNotFoundError(
            f"{error}. {run} is the work directory of a run: `python -m flowgrpo_jax.export"
            f" --workdir {run} --out DIR` writes its LoRA, and --lora DIR then takes it"
        ) from error


def _is_run(directory: Path) -> bool:
    folders = [directory / name for name in checkpoint.FOLDERS]
    return (directory / cli.CONFIG_FILE).is_file() and any(f.is_dir() for f in folders)


def read_options(family: Family, given: list[str]) -> dict[str, Any]:
    """Read options of a model, such as "t5=false". Values are JSON.

    Raises ValueError for one that is not NAME=VALUE, that the model does not have, or whose value
    is of another type than the default.
    """
    options: dict[str, Any] = {}
    for text in given:
        name, _, value = text.partition("=")
        try:
            options[name] = json.loads(value.lower())
        except ValueError as error:
            raise ValueError(f"--option={text}: give NAME=VALUE, such as name=true") from error
        default = family.options.get(name)
        if default is not None and type(options[name]) is not type(default):
            raise ValueError(f"--option={text}: must be like {name}={json.dumps(default)}")
    return models.settings_of(family, options, "--option")


def main(_: list[str]) -> None:
    args = flags.FLAGS
    out = Path(args.out)
    outputs.check_picture(out, "--out")
    settings.guidance(args.guidance, "--guidance")
    solvers.load(args.solver)
    spec = read_spec(args.lora) if args.lora else None
    family = models.find(args.model)
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    kernel = attention.load("auto", mesh, args.dtype)
    made = {"lora_spec": spec, "dtype": jnp.dtype(args.dtype), "attention": kernel}
    rank = spec.rank if spec else 1  # without an adapter the model has room for a small one
    made |= quantised.setting(args.base_dtype, rank, family.base_dtypes, "--base_dtype")
    made |= read_options(family, args.option)
    described = family.describe(args.model, **made)
    size = described.default_size
    described.latent_shape(args.height or size, args.width or size)  # judged before the weights
    with cli.compiling():
        model = family.load(args.model, **made)
        adapter = policies.load(args.lora or policies.BASE, model)
        images = generate(
            model,
            adapter,
            args.prompt,
            steps=args.steps,
            solver=args.solver,
            guidance=args.guidance,
            seed=args.seed,
            height=args.height,
            width=args.width,
        )
    for i, image in enumerate(images):
        file = out if len(images) == 1 else out.with_stem(f"{out.stem}-{i}")
        Image.fromarray(image).save(file)
        print(file)


if __name__ == "__main__":
    cli.define_flags(config=False)
    cli.define_cache_flag()
    model = "The model: a directory in diffusers' layout, a hub id, shapes or signs."
    flags.DEFINE_string("model", "shapes", model)
    flags.DEFINE_string("lora", None, "An exported LoRA: a directory or a .safetensors file.")
    prompt = "A text to draw; give the flag several times for several."
    flags.DEFINE_multi_string("prompt", None, prompt, required=True)
    flags.DEFINE_integer("steps", 40, "Steps of the ODE that draws the picture.", lower_bound=1)
    rows = f"How its steps are taken: {', '.join(solvers.TABLE)}, or package.module:NAME."
    flags.DEFINE_string("solver", "euler", rows)
    flags.DEFINE_float("guidance", 4.5, "Scale of classifier-free guidance; up to 1 means none.")
    note = "Seed of the noise, which also depends on a prompt's place."
    flags.DEFINE_integer("seed", 0, note, lower_bound=0, upper_bound=seeds.MOST)
    own = "in pixels; without it the model's own."
    flags.DEFINE_integer("height", None, f"Height of the pictures {own}", lower_bound=1)
    flags.DEFINE_integer("width", None, f"Width of the pictures {own}", lower_bound=1)
    option = "An option of the model, such as t5=false of SD3, which leaves T5 out."
    flags.DEFINE_multi_string("option", [], option)
    dtypes = ["float32", "bfloat16"]
    flags.DEFINE_enum("dtype", "float32", dtypes, "Type of the weights and the computation.")
    stored = "How the transformer's kernels are stored: int8 is half of bfloat16; empty: as dtype."
    flags.DEFINE_enum("base_dtype", "", ["", quantised.INT8], stored)
    several = "of several prompts every file gets its prompt's number."
    flags.DEFINE_string("out", "image.png", f"The picture file to write; {several}")
    cli.run(main)
