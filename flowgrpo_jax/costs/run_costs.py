"""These functions count what an epoch computes: passes of the transformer and their arithmetic."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from flowgrpo_jax import sharding
from flowgrpo_jax.assembly.recipe import Recipe
from flowgrpo_jax.costs import cost, hardware
from flowgrpo_jax.sampling import branching, sampler


def forwards(run: Recipe, epoch: int) -> float:
    """Return the transformer's forward passes an image of an epoch, both branches of guidance as
    one. A gradient counts as two more; activations that it computes again are not counted."""
    process, algorithm, key = run.setup.process, run.algorithm, jax.random.key(run.config.seed)
    together = run.plan.micro_batch // sharding.row_shards(run.mesh)
    terms = algorithm.terms(run.setup, sampler.epoch_key(key, epoch, sampler.TERMS_KEY))
    counted = []
    for start, tail in run.places(key, epoch):
        place = int(start), together
        sigmas = np.asarray(process.schedule(start, tail))
        drawn = branching.forwards(process.branches, sigmas, *place)
        steps = np.asarray(start + terms) if algorithm.records == "window" else terms
        trained = branching.states(process.branches, steps, *place)
        counted.append(drawn + trained * algorithm.passes(run.setup) * (3 + len(algorithm.reads)))
    return float(np.mean(counted)) + data_forwards(run, epoch, len(terms))


def data_forwards(run: Recipe, epoch: int, levels: int) -> float:
    """Return the passes of an epoch's loss on data, for each image of the rollouts: three at each
    noise level, in every optimiser step, and those that draw a sample of the base. None has
    guidance, so that they count by half where the rollout has two branches."""
    data, plan, config = run.data, run.plan, run.config
    if data is None or not data.falls_on(epoch):
        return 0.0
    images = data.images * data.steps(plan.updates)
    drawing = run.setup.process.steps if data.source is None else 0
    times = levels if config.train.step_each_term and not data.own_step else 1
    return images * (drawing + 3 * levels * times) / plan.images / branches_of_guidance(run)


def branches_of_guidance(run: Recipe) -> int:
    """Return in how many batches of text a velocity of the rollout is computed, 1 or 2."""
    guided = run.config.sample.guidance_scale > 1
    return 2 if run.model.guidance == "branch" and guided else 1


def forward_flop(run: Recipe) -> float:
    """Return the multiplications and additions of one pass for one image."""
    c, model = run.config, run.model
    text = jax.eval_shape(model.encode_text, model.text_shapes, model.token_shapes(1))
    latent = model.latent_shape(c.model.height, c.model.width)
    x, sigma = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((1, *latent), (1,)))
    given = (sigma,) if model.guidance == "input" else ()
    shapes = (model.trained_shapes, model.base, x, sigma, text, *given)
    return branches_of_guidance(run) * cost.flops(jax.make_jaxpr(model.velocity)(*shapes))


def line(run: Recipe, flop: float) -> str:
    """Return the line about the costs that a run prints before it begins.

    Args:
      flop: of a pass, `forward_flop(run)`.
    """
    passes = forwards(run, 0)
    frozen = jax.tree.leaves((run.model.base, run.model.params["vae"]))
    held = sum(x.addressable_shards[0].data.nbytes for x in frozen)
    return (
        f"cost        {passes:.0f} forward passes an image,"
        f" {passes * run.plan.images * flop / 1e12:,.3g} TFLOP an epoch without decoding and"
        f" rewards, {held / 1e9:.2g} GB of frozen weights on a device"
    )


def speed(run: Recipe, flop: float, epoch: int, seconds: float) -> dict[str, float]:
    """Return the figures of an epoch's speed: images and forward passes a second, the share of the
    devices' peak where it is known, and the most GB of a device's memory so far.

    Args:
      flop: of a pass, `forward_flop(run)`.
    """
    passes = forwards(run, epoch) * run.plan.images / seconds
    figures = {"images_per_second": run.plan.images / seconds, "forwards_per_second": passes}
    if peak := hardware.peak(run.mesh.devices.flat[0]):
        figures["share_of_peak"] = passes * flop / (peak * run.mesh.size)
    if used := hardware.peak_memory(run.mesh.local_devices[0]):
        figures["peak_memory_gb"] = used / 1e9
    return figures
