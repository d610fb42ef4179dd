"""The epoch of the benchmark in JAX: the programs that `flowgrpo_jax.train` runs, and no others."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from benchmarks.epoch import Arrays, serve
from flowgrpo_jax import recipe, settings, sharding, train, update
from flowgrpo_jax.models import lora_files
from flowgrpo_jax.types import Conditioning, PromptBatch, Trajectory


class JaxEngine:
    """See `epoch.Engine`."""

    def __init__(self, name: str, config: dict[str, Any], inputs: Arrays):
        del name
        self.inputs = inputs
        settings.split_cpu(ConfigDict(config))
        self.run = run = recipe.build(ConfigDict(config), training=False)
        factors = {k[5:]: v for k, v in inputs.items() if k.startswith("lora.")}
        adapter = lora_files.from_torch(factors, run.model.lora_shapes)
        state = update.init(adapter, run.optimiser, jax.random.key(config["seed"]))
        cond = Conditioning(jnp.asarray(inputs["tokens"]), jnp.asarray(inputs["pooled"]))
        self.state, self.cond = sharding.replicate(run.mesh, (state, cond))
        groups = run.plan.groups
        self.batch = PromptBatch([""] * groups, [{}] * groups, np.arange(groups, dtype=np.int32))
        self.advantages = np.split(inputs["advantages"], run.plan.micro_batches)
        self.start, self.trained = jnp.int32(0), jnp.arange(run.process.window)
        self.decoder = jax.jit(run.model.decode)
        self.epoch = 0

    def draw(self) -> Arrays:
        trajectory, _ = next(self.rollouts())
        return {"x": np.asarray(trajectory.x), "log_prob": np.asarray(trajectory.log_prob)}

    def probe(self, drawn: Arrays) -> Arrays:
        run, x = self.run, jnp.asarray(drawn["x"])
        _, rows, _ = next(train.micro_batches(run, self.batch))

        @jax.jit
        def velocity(adapter, base, x, cond, prompt):
            sigma = jnp.full(x.shape[0], run.process.sigmas[0])
            return run.model.velocity(
                adapter, base, x, sigma, cond.tokens[prompt], cond.pooled[prompt]
            )

        v = velocity(self.state.lora, run.model.base, x[0], self.cond, rows)
        images = self.decoder(run.model.params["vae"], x[0])
        trajectory = Trajectory(x, jnp.asarray(drawn["log_prob"]), x[-1], rows)
        gradient, _ = self.accumulate(update.empty(self.state.lora), trajectory, 0)
        gradients = {f"lora.{k}": v for k, v in lora_files.to_torch(gradient).items()}
        return {"velocity": np.asarray(v), "images": np.asarray(images), **gradients}

    def rollouts(self) -> Iterator[tuple[Trajectory, jax.Array]]:
        """(trajectory, images) of each micro-batch."""
        run, state = self.run, self.state
        for ids, rows, places in train.micro_batches(run, self.batch):
            trajectory, images, _ = run.programs.sample(
                state.lora, run.weights, self.cond, self.cond, state.key, self.epoch, self.start,
                ids, rows, places,
            )  # fmt: skip
            yield trajectory, images

    def sample(self) -> None:
        self.trajectories, images = zip(*self.rollouts())
        jax.block_until_ready(self.trajectories)
        jax.device_get(images)
        self.epoch += 1

    def decode(self) -> None:
        vae = self.run.model.params["vae"]
        jax.device_get([self.decoder(vae, t.latents) for t in self.trajectories])

    def update(self) -> None:
        accumulated = update.empty(self.state.lora)
        for m, trajectory in enumerate(self.trajectories):
            accumulated = self.accumulate(accumulated, trajectory, m)
        self.state, _ = self.run.programs.apply(self.state, accumulated[0])
        jax.block_until_ready(self.state)

    def device_peak(self) -> float:
        statistics = jax.devices()[0].memory_stats() or {}
        return statistics.get("peak_bytes_in_use", 0) / 2**30

    def accumulate(self, accumulated: Any, trajectory: Trajectory, m: int) -> Any:
        """Add micro-batch m's share to (gradient, figures)."""
        run, adapter = self.run, self.state.lora
        advantage = sharding.split_rows(run.mesh, self.advantages[m])
        return run.programs.accumulate(
            *accumulated, adapter, adapter, run.model.base, self.cond, self.cond, trajectory,
            advantage, self.start, self.trained,
        )  # fmt: skip


if __name__ == "__main__":
    serve(JaxEngine)
