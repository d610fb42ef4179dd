"""These functions count what an epoch computes: passes of the transformer and their arithmetic."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flowgrpo_jax import sharding
from flowgrpo_jax.assembly import parts
from flowgrpo_jax.assembly.run import Run
from flowgrpo_jax.costs import cost, hardware
from flowgrpo_jax.sampling import branching, sampler


class Passes(NamedTuple):
    """Passes of the transformer for an image of an epoch, both branches of guidance as one."""

    forward: float  # without a gradient
    gradient: float  # forward and backward

    @property
    def forwards(self) -> float:
        """Return both as forward passes, where a gradient counts as three."""
        return self.forward + 3 * self.gradient


class Flop(NamedTuple):
    """Multiplications and additions of a pass for one image."""

    forward: float
    gradient: float  # forward and backward; activations that are computed again are not counted

    def of(self, passes: Passes) -> float:
        return passes.forward * self.forward + passes.gradient * self.gradient


def passes(run: Run, epoch: int) -> Passes:
    """Return the passes of an epoch."""
    process, algorithm, key = run.setup.process, run.algorithm, jax.random.key(run.config.seed)
    together = run.plan.micro_batch // sharding.row_shards(run.mesh)
    terms = algorithm.terms(run.setup, sampler.epoch_key(key, epoch, sampler.TERMS_KEY))
    drawn, trained = [], []
    for start, tail in run.places(key, epoch):
        place = int(start), together
        sigmas = np.asarray(process.schedule(start, tail))
        drawn.append(branching.forwards(process.branches, sigmas, *place))
        steps = np.asarray(start + terms) if algorithm.records == "window" else terms
        states = branching.states(process.branches, steps, *place)
        trained.append(states * algorithm.passes(run.setup))
    gradients = float(np.mean(trained))
    forward = float(np.mean(drawn)) + len(algorithm.reads) * gradients
    if run.config.train.tape:  # the forward passes of the gradients are among those of the rollout
        forward -= gradients
    data = data_passes(run, epoch, len(terms))
    return Passes(forward + data.forward, gradients + data.gradient)


def data_passes(run: Run, epoch: int, levels: int) -> Passes:
    """Return the passes of an epoch's loss on data, for each image of the rollouts: a gradient at
    each noise level, in every optimiser step, and the passes that draw a sample of the base. None
    has guidance, so that they count by half where the rollout has two branches."""
    data, plan, config = run.data, run.plan, run.config
    if data is None or not data.falls_on(epoch):
        return Passes(0.0, 0.0)
    images = data.images * data.steps(plan.updates) / plan.images / branches_of_guidance(run)
    drawing = run.setup.process.steps if data.source is None else 0
    times = levels if config.train.step_each_term and not data.own_step else 1
    return Passes(images * drawing, images * levels * times)


def branches_of_guidance(run: Run) -> int:
    """Return in how many batches of text a velocity of the rollout is computed, 1 or 2."""
    guided = run.config.sample.guidance_scale > 1
    return 2 if run.model.guidance == "branch" and guided else 1


def flop_of_pass(run: Run) -> Flop:
    """Count the arithmetic of a pass, from the traced program."""
    config = run.config.copy_and_resolve_references()
    config.model.remat, config.model.attention = False, "xla"
    model = parts.describe_model(config, run.mesh)
    text = jax.eval_shape(model.encode_text, model.text_shapes, model.token_shapes(1))
    latent = model.latent_shape(config.model.height, config.model.width)
    x, sigma = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((1, *latent), (1,)))
    given = (sigma,) if model.guidance == "input" else ()
    shapes = (model.trained_shapes, model.base, x, sigma, text, *given)

    def total(*inputs: Any) -> jax.Array:
        return model.velocity(*inputs).sum()

    programs = model.velocity, jax.value_and_grad(total)
    counted = [cost.flops(jax.make_jaxpr(program)(*shapes)) for program in programs]
    return Flop(*(branches_of_guidance(run) * flop for flop in counted))


def line(run: Run, flop: Flop) -> str:
    """Return the line about the costs that a run prints before it begins."""
    first = passes(run, 0)
    frozen = jax.tree.leaves((run.model.base, run.model.params["vae"]))
    held = sum(x.addressable_shards[0].data.nbytes for x in frozen)
    return (
        f"cost        {first.forwards:.0f} forward passes an image,"
        f" {run.plan.images * flop.of(first) / 1e12:,.3g} TFLOP an epoch without decoding and"
        f" rewards, {held / 1e9:.2g} GB of frozen weights on a device"
    )


def speed(run: Run, flop: Flop, epoch: int, seconds: float) -> dict[str, float]:
    """Return the figures of an epoch's speed: images and forward passes a second, the share of the
    devices' peak where it is known, and the most GB of a device's memory so far."""
    done, rate = passes(run, epoch), run.plan.images / seconds
    figures = {"images_per_second": rate, "forwards_per_second": rate * done.forwards}
    if peak := hardware.peak(run.mesh.devices.flat[0]):
        figures["share_of_peak"] = rate * flop.of(done) / (peak * run.mesh.size)
    used = [hardware.peak_memory(device) for device in run.mesh.local_devices]
    if known := [most for most in used if most]:
        figures["peak_memory_gb"] = max(known) / 1e9
    return figures
