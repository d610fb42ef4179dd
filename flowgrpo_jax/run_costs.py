"""What an epoch of a run computes: passes of the transformer, their arithmetic, and its speed."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from flowgrpo_jax import branching, hardware, sampler, sharding
from flowgrpo_jax.recipe import Recipe


def forwards(run: Recipe, epoch: int) -> float:
    """Return the transformer's forward passes an image of an epoch, both branches of guidance as
    one. A gradient counts as two more."""
    process, algorithm, key = run.setup.process, run.algorithm, jax.random.key(run.config.seed)
    together = run.plan.micro_batch // sharding.row_shards(run.mesh)
    terms = algorithm.terms(run.setup, sampler.epoch_key(key, epoch, sampler.TERMS_KEY))
    counted = []
    for start, tail in run.places(key, epoch):
        sets = int(start), together
        drawn = branching.forwards(process.branches, process.schedule(start, tail), *sets)
        steps = np.asarray(start + terms) if algorithm.records == "window" else terms
        trained = branching.states(process.branches, steps, *sets)
        counted.append(drawn + trained * (3 + len(algorithm.reads)))
    return float(np.mean(counted))


def line(run: Recipe) -> str:
    """Return the line about this that a run prints before it begins."""
    passes = forwards(run, 0)
    work = passes * run.plan.images * run.forward_flop
    frozen = jax.tree.leaves((run.model.base, run.model.params["vae"]))
    held = sum(x.addressable_shards[0].data.nbytes for x in frozen)
    return (
        f"cost        {passes:.0f} forward passes an image, {work / 1e12:,.3g} TFLOP an epoch"
        f" without decoding and rewards, {held / 1e9:.2g} GB of frozen weights on a device"
    )


def speed(run: Recipe, epoch: int, seconds: float) -> dict[str, float]:
    """Return the figures of an epoch's speed: images and forward passes a second, the share of the
    devices' peak where it is known, and the most memory of a device in use so far in GB."""
    devices = run.mesh.devices.flat
    passes = forwards(run, epoch) * run.plan.images / seconds
    figures = {"images_per_second": run.plan.images / seconds, "forwards_per_second": passes}
    if peak := hardware.peak(devices[0]):
        figures["share_of_peak"] = passes * run.forward_flop / (peak * run.mesh.size)
    if used := hardware.peak_memory(_own(devices)):
        figures["peak_memory_gb"] = used / 1e9
    return figures


def _own(devices: Any) -> Any:
    """Return a device of this process."""
    return next(d for d in devices if d.process_index == jax.process_index())
