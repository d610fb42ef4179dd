"""Make the model in the box from nothing: `python -m flowgrpo_jax.shapes.pretrain --workdir DIR`.

First the autoencoder, then the transformer and its three text encoders together, by flow matching
on the autoencoder's latents. Stops and resumes at any time; writes a directory in diffusers layout.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from flowgrpo_jax import cli
from flowgrpo_jax.checkpoint import Checkpoints
from flowgrpo_jax.models.layers import Params
from flowgrpo_jax.models.tokenizers import Tokenizers
from flowgrpo_jax.shapes import data, flow, grammar, package, vae
from flowgrpo_jax.shapes.tokenizers import sizes, write_tokenizers

SAVE_EVERY = 500


def loop(
    name: str,
    workdir: Path,
    state: dict[str, Any],
    step: Callable[..., Any],
    batch: Callable[[np.random.Generator], Any],
    steps: int,
    seed: int,
) -> dict[str, Any]:
    """Train `state` for `steps` steps from where its last checkpoint stands."""
    checkpoints = Checkpoints(workdir / f"{name}-checkpoints", keep=1)
    if checkpoints.steps():
        trees, _ = checkpoints.newest({"state": state})
        state = trees["state"]
    key = jax.random.key(seed)
    start = int(state["step"])
    bar = tqdm(range(start, steps), initial=start, total=steps, desc=name, mininterval=2)
    for i in bar:
        rng = np.random.default_rng([seed, i])
        state, metrics = step(state, *batch(rng), key)
        if i % 20 == 0:
            bar.set_postfix_str(" ".join(f"{float(m):.4g}" for m in metrics))
        if (i + 1) % SAVE_EVERY == 0 or i + 1 == steps:
            checkpoints.write(i + 1, {"state": state}, {"step": i + 1})
    checkpoints.close()
    return state


def train_vae(workdir: Path, pictures: data.Dataset, steps: int, seed: int) -> dict[str, Any]:
    def batch(rng: np.random.Generator) -> tuple[np.ndarray]:
        return (pictures.images[rng.integers(len(pictures.images), size=32)],)

    state = vae.init(steps, seed)
    return loop("vae", workdir, state, vae.train_step(steps), batch, steps, seed)


def train_flow(
    workdir: Path,
    latents: np.ndarray,
    captions: np.ndarray,
    modules: flow.Makers,
    tokenizers: Tokenizers,
    params: dict[str, Params],
    args: argparse.Namespace,
) -> dict[str, Any]:
    table: Any = tokenizers([*data.caption_table(), ""])  # the last row is the empty caption

    def batch(rng: np.random.Generator) -> tuple[Any, ...]:
        rows = rng.integers(len(latents), size=args.batch)
        empty = rng.random(args.batch) < flow.EMPTY_CAPTION
        caption = np.where(empty, len(table[0]) - 1, captions[rows])
        return jnp.asarray(latents[rows]), tuple(jnp.asarray(ids[caption]) for ids in table)

    state = flow.init(params, args.flow_steps, args.learning_rate)
    step = flow.train_step(modules, args.flow_steps, args.learning_rate)
    return loop("flow", workdir, state, step, batch, args.flow_steps, args.seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=Path, required=True, help="checkpoints and caches")
    parser.add_argument(
        "--out", type=Path, help="model directory to write; WORKDIR/model without it"
    )
    parser.add_argument(
        "--start_from",
        type=Path,
        help="written model: keep its autoencoder, train on from the rest",
    )
    parser.add_argument("--pictures", type=int, default=60_000)
    parser.add_argument("--vae_steps", type=int, default=1_500)
    parser.add_argument("--flow_steps", type=int, default=12_000)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--learning_rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    out = args.out or args.workdir / "model"
    args.workdir.mkdir(parents=True, exist_ok=True)

    pictures = data.make(args.pictures, args.seed, cache=args.workdir)
    if args.start_from:
        vae_params = package.read(args.start_from, {"vae": vae.create})["vae"]
    else:
        vae_params = train_vae(args.workdir, pictures, args.vae_steps, args.seed)["params"]
    weights = b"".join(np.asarray(x).tobytes() for x in vae_params.values())
    autoencoder = hashlib.sha256(weights).hexdigest()
    cache = args.workdir / f"latents-{args.seed}-{args.pictures}-{autoencoder[:12]}.npy"
    if not cache.exists():
        np.save(cache, vae.encode_all(vae_params, pictures.images))
    latents = np.load(cache)
    scaling, shift = vae.statistics(latents)
    latents = (latents - shift) * scaling

    words = grammar.vocabulary()
    write_tokenizers(out, words)
    tokenizers = Tokenizers.load(out, t5_length=flow.TOKENS)
    n_clip, n_t5 = sizes(words)
    clip_l, clip_g = (flow.clip_config(n_clip, a, n_clip - 1) for a in ("quick_gelu", "gelu"))
    t5 = flow.t5_config(n_t5)
    modules = flow.makers(clip_l, clip_g, t5)
    start = args.start_from
    params = package.read(start, modules) if start else flow.init_params(modules, args.seed)
    trained = train_flow(
        args.workdir, latents, pictures.captions, modules, tokenizers, params, args
    )

    vae_config = dataclasses.replace(vae.CONFIG, scaling_factor=scaling, shift_factor=shift)
    package.write(
        out, {**trained["ema"], "vae": vae_params}, flow.TRANSFORMER, vae_config, clip_l, clip_g, t5
    )
    print(f"wrote {out}")


if __name__ == "__main__":
    cli.restart_with_huge_pages()
    main()
