"""The epoch of the benchmark in JAX: the programs that `flowgrpo_jax.train` runs, and no others."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from benchmarks.engine import Arrays, serve
from flowgrpo_jax import sharding, update
from flowgrpo_jax.assembly import parts, settings
from flowgrpo_jax.assembly.run import build_run
from flowgrpo_jax.models import lora_files
from flowgrpo_jax.sampling import sampler
from flowgrpo_jax.types import Credit, PromptBatch, Rollout


class JaxEngine:
    """See `engine.Engine`."""

    def __init__(self, name: str, config: dict[str, Any], inputs: Arrays):
        self.inputs = inputs
        changed = ConfigDict(config)
        changed.train.tape = name == "jax-tape"
        settings.split_cpu(changed)
        self.run = run = build_run(changed, training=False)
        factors = {k[5:]: v for k, v in inputs.items() if k.startswith("lora.")}
        adapter = lora_files.from_torch(factors, run.model.trained_shapes)
        key = jax.random.key(config["seed"])
        state = update.init(adapter, run.algorithm.copies, {}, run.optimiser, key)
        text = {name: jnp.asarray(inputs[name]) for name in ("tokens", "pooled")}
        cond = {name: x[:-1] for name, x in text.items()}
        empty = {name: x[-1:] for name, x in text.items()}
        self.state, self.cond, self.none = sharding.replicate(run.mesh, (state, cond, empty))
        groups = run.plan.groups
        self.batch = PromptBatch([""] * groups, [{}] * groups, np.arange(groups, dtype=np.int32))
        self.advantages = np.split(inputs["advantages"], run.plan.micro_batches)
        self.start = jnp.int32(0)
        self.terms = run.algorithm.terms(run.setup, key)
        self.decoder = jax.jit(parts.make_decode(run.config, run.model, run.mesh))
        self.epoch = 0

    def draw(self) -> Arrays:
        rollout, _ = next(self.rollouts())
        return {"x": np.asarray(rollout.x), "log_prob": np.asarray(rollout.log_prob)}

    def probe(self, drawn: Arrays) -> Arrays:
        run, x = self.run, jnp.asarray(drawn["x"])
        _, rows, _ = next(run.micro_batches(self.batch))

        guidance = run.config.sample.guidance_scale
        guided = jax.jit(sampler.guided(run.model.velocity, guidance, run.model.guidance))
        sigma, texts = jnp.float32(run.setup.process.sigmas[0]), (self.cond, self.none)
        v = guided(self.state.policy, run.model.base, x[0], sigma, *texts, rows)
        images = self.decoder(run.model.params["vae"], x[0]).pixels
        log_prob, start = jnp.asarray(drawn["log_prob"]), jnp.int32(0)
        keys = jax.random.split(self.state.key, len(rows))  # which this algorithm does not read
        rollout = Rollout(x[-1], rows, keys, start, x, log_prob)
        gradient, _ = self.accumulate(self.empty(), rollout, 0)
        gradients = {f"lora.{k}": v for k, v in lora_files.to_torch(gradient).items()}
        return {"velocity": np.asarray(v), "images": np.asarray(images), **gradients}

    def rollouts(self) -> Iterator[tuple[Rollout, jax.Array]]:
        """Yield the rollout and the images of each micro-batch."""
        run, state = self.run, self.state
        for ids, rows, places in run.micro_batches(self.batch):
            rollout, pictures, _ = run.programs.sample(
                state.policy, run.weights, self.cond, self.none, state.key, self.epoch, self.start,
                ids, rows, places,
            )  # fmt: skip
            yield rollout, pictures.pixels

    def sample(self) -> None:
        self.drawn, images = zip(*self.rollouts())
        jax.block_until_ready(self.drawn)
        jax.device_get(images)
        self.epoch += 1

    def decode(self) -> None:
        vae = self.run.model.params["vae"]
        jax.device_get([self.decoder(vae, rollout.latents).pixels for rollout in self.drawn])

    def update(self) -> None:
        accumulated = self.empty()
        for m, rollout in enumerate(self.drawn):
            accumulated = self.accumulate(accumulated, rollout, m)
        self.state, _ = self.run.programs.apply(self.state, accumulated[0])
        jax.block_until_ready(self.state)

    def device_peak(self) -> float:
        statistics = jax.devices()[0].memory_stats() or {}
        return statistics.get("peak_bytes_in_use", 0) / 2**30

    def empty(self) -> update.Carry:
        return update.empty(self.run.algorithm, self.run.setup, self.state.policy)

    def accumulate(self, accumulated: update.Carry, rollout: Rollout, m: int) -> update.Carry:
        """Add micro-batch m's share to (gradient, figures)."""
        run, adapter = self.run, self.state.policy
        others = {name: adapter for name in run.algorithm.reads}
        credit = Credit(sharding.split_rows(run.mesh, self.advantages[m]))
        return run.programs.accumulate(
            *accumulated, adapter, others, run.model.base, self.cond, self.none, rollout,
            credit, self.terms,
        )  # fmt: skip


if __name__ == "__main__":
    serve(JaxEngine)
