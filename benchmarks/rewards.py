"""Measure the cost of rewards: milliseconds an image on the host, arithmetic in the graph.

    python -m benchmarks.rewards --out benchmarks/results/rewards.json

Host rewards see 512 px pictures (the shapes verifier its own 64 px ones) in batches of 8, OCR on
one core; the median of five batches after a first one. Rewards in the graph are not run: their
arithmetic is counted in the program that would run, for one image and its prompt.
"""

from __future__ import annotations

import json
import os
import platform
import time
from importlib import metadata
from pathlib import Path
from statistics import median

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from benchmarks import machine
from flowgrpo_jax import rewards
from flowgrpo_jax.costs import cost
from flowgrpo_jax.worlds.shapes import grammar as shapes
from flowgrpo_jax.worlds.shapes.render import render as render_scene
from flowgrpo_jax.worlds.signs import grammar as signs
from flowgrpo_jax.worlds.signs.render import render as render_sign

BATCH, REPEATS = 8, 5
OBJECT = {"tag": "single_object", "include": [{"class": "person", "count": 1}]}
HOST = {  # row: its options, and what it looks at
    "jpeg_compressibility": ({}, "sign"),
    "ocr": ({"workers": 1}, "sign"),
    "geneval": ({"detector": "small"}, "sign"),
    "shapes": ({}, "scene"),
}


def pictures(kind: str, rng: np.random.Generator) -> tuple[np.ndarray, list[str], list[dict]]:
    if kind == "scene":
        pool = shapes.prompts("test")
        records = [pool[i] for i in rng.integers(len(pool), size=BATCH)]
        scenes = [render_scene(shapes.sample_scene(record, rng)) for record in records]
        return np.stack(scenes), [record["prompt"] for record in records], records
    words = [signs.WORDS[i] for i in rng.integers(len(signs.WORDS), size=BATCH)]
    drawn = [Image.fromarray(render_sign(signs.sample_sign(word, rng))) for word in words]
    large = np.stack([np.asarray(image.resize((512, 512))) for image in drawn])
    return large, [signs.PROMPT.format(word) for word in words], [OBJECT] * BATCH


def milliseconds(name: str) -> float:
    """An image."""
    options, kind = HOST[name]
    reward, rng, taken = rewards.load([name], {name: options})[name], np.random.default_rng(0), []
    for _ in range(REPEATS + 1):
        batch = pictures(kind, rng)
        begun = time.perf_counter()
        _, valid = reward(*batch)
        taken.append(time.perf_counter() - begun)
        if not np.all(valid):
            raise RuntimeError(f"{name} failed on {np.sum(~valid)} of {BATCH} pictures")
    return 1000 * median(taken[1:]) / BATCH


def gigaflops(name: str) -> float:
    """An image with its prompt."""
    reward, wanted = rewards.describe([name], {})[name]
    image = jax.ShapeDtypeStruct((1, 512, 512, 3), jnp.uint8)
    rows = {key: jax.ShapeDtypeStruct((1, *x.shape), x.dtype) for key, x in wanted.items()}
    return cost.flops(jax.jit(reward.score).trace(reward.weights, image, rows).jaxpr) / 1e9


def main() -> None:
    parser = machine.parser(__doc__)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args()
    result = {
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "versions": {name: metadata.version(name) for name in ("jax", "rapidocr", "onnxruntime")},
        "milliseconds": {name: round(milliseconds(name), 2) for name in HOST},
        "gigaflops": {n: round(gigaflops(n), 1) for n in rewards.describe(rewards.TABLE, {})},
    }
    print(json.dumps(result, indent=2))
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
