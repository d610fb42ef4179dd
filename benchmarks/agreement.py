"""Whether the engines of benchmarks.epoch compute the same, before their times are compared."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from benchmarks.engine import Arrays

# Largest relative difference to the first engine; of images, largest difference in grey levels.
# On a GPU products are in TF32 or bfloat16, and so are the differences.
TOLERANCES = {
    "cpu": {"velocity": 1e-4, "gradient": 1e-3, "images": 1.0},
    "bfloat16": {"velocity": 0.05, "gradient": 0.1, "images": 1.0},  # of products on the CPU
    "gpu": {"velocity": 5e-2, "gradient": 2e-1, "images": 16.0},
}


def differences(folder: Path, names: list[str]) -> dict[str, dict[str, float]]:
    """{engine: {velocity, gradient, images}}, each engine against the first."""
    first, *others = ({k: v for k, v in np.load(folder / f"{n}.npz").items()} for n in names)
    return {name: _difference(other, first) for name, other in zip(names[1:], others)}


def _difference(a: Arrays, b: Arrays) -> dict[str, float]:
    if a.keys() != b.keys():
        raise RuntimeError(f"only one engine has {sorted(a.keys() ^ b.keys())}")

    def relative(names: list[str]) -> float:
        x, y = (np.concatenate([part[n].ravel() for n in names]) for part in (a, b))
        return float(np.linalg.norm(x - y) / np.linalg.norm(y))

    levels = np.abs(a["images"].astype(int) - b["images"]).max()
    gradient = sorted(name for name in a if name.startswith("lora."))
    return {
        "velocity": relative(["velocity"]),
        "gradient": relative(gradient),
        "images": float(levels),
    }


def check(
    folder: Path, names: list[str], kind: str
) -> tuple[dict[str, dict[str, float]], list[str]]:
    """Print and return how far engines differ on one rollout, and sentences on what is too far."""
    found, problems = differences(folder, names), []
    for name, values in found.items():
        print(
            f"{name} against {names[0]}, same weights and rollout: velocity differs by"
            f" {values['velocity']:.1e} (relative), gradient by {values['gradient']:.1e}, images by"
            f" at most {values['images']:.0f} of 255 levels"
        )
        for what, value in values.items():
            if not value <= TOLERANCES[kind][what]:
                problems.append(
                    f"{name} and {names[0]} do not compute the same {what}: {value:.2g} is above"
                    f" {TOLERANCES[kind][what]:g}, so a comparison of their times means nothing"
                )
    return found, problems
