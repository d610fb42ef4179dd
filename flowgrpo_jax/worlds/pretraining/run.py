"""Make the small model of a world: `python -m flowgrpo_jax.worlds.WORLD.pretrain --workdir DIR`.

First the autoencoder, then the transformer and its three text encoders together, by flow matching
on the autoencoder's latents. Stops and resumes at any time; writes a directory in diffusers layout.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from tqdm import tqdm

from flowgrpo_jax import seeds
from flowgrpo_jax.checkpoints.checkpoint import Checkpoints
from flowgrpo_jax.command_line import exit_status
from flowgrpo_jax.command_line.stop import Stop, Stopped
from flowgrpo_jax.models.layers import Params
from flowgrpo_jax.models.sd3.tokenizers import Tokenizers
from flowgrpo_jax.models.vae import VAEConfig
from flowgrpo_jax.storage import files
from flowgrpo_jax.worlds.pretraining import data, flow, package, vae
from flowgrpo_jax.worlds.pretraining.tokenizers import sizes, write_tokenizers
from flowgrpo_jax.worlds.pretraining.world import World

SAVE_AFTER = 120.0  # seconds: whether a step takes long or not


def loop(
    name: str,
    workdir: Path,
    state: dict[str, Any],
    step: Callable[..., Any],
    batch: Callable[[np.random.Generator], Any],
    steps: int,
    seed: int,
) -> dict[str, Any]:
    """Train `state` for `steps` steps from where its last checkpoint stands.

    Ctrl-C and SIGTERM save and raise Stopped.
    """
    checkpoints = Checkpoints(workdir / f"{name}-checkpoints", keep=1)
    if checkpoints.steps():
        trees, _ = checkpoints.newest({"state": state})
        state = trees["state"]
    key = jax.random.key(seed)
    start = int(state["step"])
    bar = tqdm(range(start, steps), initial=start, total=steps, desc=name, mininterval=2)
    saved = time.monotonic()
    with Stop() as stop, closing(checkpoints):
        for i in bar:
            rng = np.random.default_rng([seed, i])
            state, metrics = step(state, *batch(rng), key)
            if i % 20 == 0:
                bar.set_postfix_str(" ".join(f"{float(m):.4g}" for m in metrics))
            told = stop.requested
            if time.monotonic() - saved > SAVE_AFTER or i + 1 == steps or told:
                checkpoints.write(i + 1, {"state": state}, {"step": i + 1})
                saved = time.monotonic()
            if told:
                raise Stopped(told)
    return state


def train_vae(args: argparse.Namespace, pictures: data.Dataset) -> Params:
    """The autoencoder's weights: those of --start_from, or trained from --vae_from's or nothing."""
    if start := args.start_from or args.vae_from:
        params = package.read(start, {"vae": vae.create})["vae"]
    else:
        params = vae.init_params(args.seed)
    if args.start_from:
        return params

    def batch(rng: np.random.Generator) -> tuple[np.ndarray]:
        return (pictures.images[rng.integers(len(pictures.images), size=32)],)

    state, step = vae.init(params, args.vae_steps), vae.train_step(args.vae_steps)
    return loop("vae", args.workdir, state, step, batch, args.vae_steps, args.seed)["params"]


def encoded(
    args: argparse.Namespace, params: Params, pictures: data.Dataset
) -> tuple[np.ndarray, VAEConfig]:
    """The pictures' latents, of mean 0 and deviation 1, and the config that makes them so."""
    weights = b"".join(np.asarray(x).tobytes() for x in params.values())
    autoencoder = hashlib.sha256(weights).hexdigest()[:12]
    cache = args.workdir / f"latents-{args.seed}-{args.pictures}-{autoencoder}.npy"
    if not cache.exists():
        made = vae.encode_all(params, pictures.images)
        data.write_whole(cache, lambda file: np.save(file, made))
    latents = np.load(cache)
    scaling, shift = vae.statistics(latents)
    config = dataclasses.replace(vae.CONFIG, scaling_factor=scaling, shift_factor=shift)
    return (latents - shift) * scaling, config


def train_flow(
    args: argparse.Namespace,
    modules: flow.Makers,
    latents: np.ndarray,
    captions: np.ndarray,
    table: Sequence[np.ndarray],
) -> dict[str, Params]:
    """The averaged weights of the transformer and its text encoders.

    Args:
      captions: i32 [n], rows of `table`, which holds the ids of each caption in the three
        tokenizers, i32 [captions + 1, length] each; its last row is the empty caption.
    """
    start = args.start_from
    params = package.read(start, modules) if start else flow.init_params(modules, args.seed)

    def batch(rng: np.random.Generator) -> tuple[Any, ...]:
        rows = rng.integers(len(latents), size=args.batch)
        empty = rng.random(args.batch) < flow.EMPTY_CAPTION
        caption = np.where(empty, len(table[0]) - 1, captions[rows])
        return jnp.asarray(latents[rows]), tuple(jnp.asarray(ids[caption]) for ids in table)

    state = flow.init(params, args.flow_steps, args.learning_rate)
    step = flow.train_step(modules, args.flow_steps, args.learning_rate)
    return loop("flow", args.workdir, state, step, batch, args.flow_steps, args.seed)["ema"]


def arguments(world: World) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=f"Make the model of the {world.name} world:"
        f" `python -m flowgrpo_jax.worlds.{world.name}.pretrain --workdir DIR`."
    )
    parser.add_argument("--workdir", type=Path, required=True, help="checkpoints and caches")
    parser.add_argument(
        "--out", type=Path, help="model directory to write; WORKDIR/model without it"
    )
    start = parser.add_mutually_exclusive_group()
    start.add_argument(
        "--start_from",
        type=Path,
        help="written model: keep its autoencoder, train on from the rest",
    )
    start.add_argument(
        "--vae_from", type=Path, help="written model, of any world: train its autoencoder on"
    )
    parser.add_argument("--pictures", type=int, default=60_000)
    parser.add_argument(
        "--garbled", type=float, default=world.garbled, help="share of captions that are wrong"
    )
    parser.add_argument("--vae_steps", type=int, default=1_500)
    parser.add_argument("--flow_steps", type=int, default=10_000)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--learning_rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def begin(args: argparse.Namespace, world: World) -> None:
    """Make the work directory, or check that the run in it has the same settings.

    Raises ValueError that names the settings that differ, because caches and checkpoints of another
    run would be used. Impossible settings are an error before they are written to the directory.
    """
    data.check(args.pictures)
    seeds.check("--seed", args.seed)
    if not 0 <= args.garbled <= 1:
        raise ValueError(f"--garbled={args.garbled}: a share of captions, must be in [0, 1]")
    for start in filter(None, (args.start_from, args.vae_from)):
        if not (start / "model_index.json").is_file():
            raise FileNotFoundError(f"{start} holds no model_index.json: give a written model")
    images, captions = data.chunk(world, args.seed, 0)
    drawn = hashlib.sha256(images.tobytes() + captions.tobytes()).hexdigest()[:12]
    settings = {k: str(v) for k, v in vars(args).items() if k not in ("workdir", "out")}
    settings |= {"world": world.name, "first pictures": drawn}
    file = args.workdir / "pretrain.json"
    if file.exists():
        before = json.loads(file.read_text())
        names = [name for name in settings if settings[name] != before.get(name)]
        if names:
            differing = ", ".join(f"{n} {before.get(n)} -> {settings[n]}" for n in names)
            raise ValueError(
                f"{args.workdir} holds another pretraining run ({differing}): give another"
                " --workdir, or the same settings to go on"
            )
    args.workdir.mkdir(parents=True, exist_ok=True)
    files.replace(epath.Path(file), json.dumps(settings, indent=2) + "\n")


@exit_status.ending()
def main(world: World) -> None:
    args = arguments(world)
    world = dataclasses.replace(world, garbled=args.garbled)
    begin(args, world)
    try:
        print(f"wrote {make(args, world)}")
    except Stopped as stopped:
        print("stopped; the same command goes on")
        by_sigterm = stopped.args[0] == signal.SIGTERM
        raise SystemExit(exit_status.RESTART if by_sigterm else 0) from stopped


def make(args: argparse.Namespace, world: World) -> Path:
    """The model's directory, written when all parts of it are trained."""
    out = args.out or args.workdir / "model"
    pictures = data.make(world, args.pictures, args.seed, cache=args.workdir)
    vae_params = train_vae(args, pictures)
    latents, vae_config = encoded(args, vae_params, pictures)

    write_tokenizers(out, world.words, world.length, world.spelled)
    tokenizers = Tokenizers.load(out, t5_length=world.length)
    n_clip, n_t5 = sizes(world.words, world.spelled)
    clip_l, clip_g = (flow.clip_config(n_clip, world.length, a) for a in ("quick_gelu", "gelu"))
    t5 = flow.t5_config(n_t5)
    modules = flow.makers(clip_l, clip_g, t5)
    table: Any = tokenizers([*data.caption_table(world), ""])
    trained = train_flow(args, modules, latents, pictures.captions, table)

    params = {**trained, "vae": vae_params}
    package.write(out, params, flow.TRANSFORMER, vae_config, clip_l, clip_g, t5)
    return out
