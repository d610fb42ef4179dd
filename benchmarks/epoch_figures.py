"""What `benchmarks.epoch` reports: medians of the engines' epochs, and how they compare."""

from __future__ import annotations

from statistics import median
from typing import Any

from benchmarks import machine

TIMES = ("sample", "decode", "update", "epoch")  # seconds; sampling includes decoding
Epochs = dict[str, list[dict[str, float]]]  # {engine: the figures of each}


def summarise(epochs: list[dict[str, float]], images: int) -> dict[str, float]:
    """Medians of the times; memory is a high-water mark, so its last value counts."""
    result = {t: median(e[t] for e in epochs) for t in TIMES}
    return result | {
        "images_per_second": images / result["epoch"],
        "peak_gib": epochs[-1]["peak_gib"],
    }


def table(figures: dict[str, dict[str, float]], ratio: dict[str, dict[str, float]]) -> str:
    columns = {
        "sample+decode s": "sample",
        "decode s": "decode",
        "update s": "update",
        "epoch s": "epoch",
        "images/s": "images_per_second",
        "peak GiB": "peak_gib",
        "warm-up s": "warmup",
    }
    lines = [f"{'':20}" + "".join(f"{title:>17}" for title in columns)]
    for name, values in (figures | ratio).items():
        cells = (f"{values[key]:17.2f}" if key in values else "" for key in columns.values())
        lines.append(f"{name:20}" + "".join(f"{cell:>17}" for cell in cells))
    return "\n".join(lines)


def ratios(figures: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """{engine: {time or memory: its value / JAX's}}; above 1 JAX is ahead."""
    if "jax" not in figures:
        return {}
    jax = figures["jax"]
    return {
        f"{name} / jax": {key: values[key] / jax[key] for key in (*TIMES, "peak_gib")}
        for name, values in figures.items()
        if name != "jax"
    }


def describe(config: dict[str, Any], hardware: dict[str, Any], env: dict[str, str]) -> str:
    s, model = config["sample"], config["model"]
    versions = ", ".join(f"{name} {hardware[name]}" for name in machine.PACKAGES)
    return "\n".join(
        [
            f"{model['path']}, {model['height']} px, {model['dtype']}, LoRA rank"
            f" {config['lora']['rank']}",
            f"{s['groups']} groups x {s['group_size']} images in micro-batches of"
            f" {s['micro_batch']}; {s['steps']} steps, {s['window']} of them stochastic and"
            f" trained; remat in JAX: {model['remat']}",
            f"{hardware['gpu'] or 'no GPU'}; {hardware['cpu']}, {hardware['cores']} cores,"
            f" {hardware['memory_gib']:.0f} GiB, GLIBC_TUNABLES={env.get('GLIBC_TUNABLES', '')!r}",
            f"Python {hardware['python']}, {versions}, commit {hardware['commit']}",
        ]
    )


def summary(
    epochs: Epochs, warmup: dict[str, float], config: dict[str, Any]
) -> dict[str, dict[str, Any]]:
    """Return the medians of the epochs so far, their ratios, and the epochs themselves."""
    images = config["sample"]["groups"] * config["sample"]["group_size"]
    figures = {
        name: summarise(runs, images) | {"warmup": warmup[name]} for name, runs in epochs.items()
    }
    return {"medians": figures, "ratios": ratios(figures), "epochs": epochs}
