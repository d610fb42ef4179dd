"""The shapes of a run's arrays and where they lie on a mesh: what its programs are compiled for.

Nothing here holds values, so that a pod's programs can be lowered on a machine without its chips.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flowgrpo_jax import sharding, update
from flowgrpo_jax.advantages import Advantage
from flowgrpo_jax.algorithms import Algorithm, Setup
from flowgrpo_jax.models import Model
from flowgrpo_jax.types import Rollout


def laid_out(tree: Any, layout: Any) -> Any:
    """Shapes with a layout, one for all or a tree of them: what `lower` takes for arrays."""
    if isinstance(layout, jax.sharding.Sharding):
        layout = jax.tree.map(lambda _: layout, tree)
    return jax.tree.map(
        lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), tree, layout
    )


def array(layout: Any, *shape: int, dtype: Any = jnp.int32) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=layout)


def frozen(model: Model, mesh: Mesh) -> dict[str, Any]:
    """The frozen weights of each part, where `load` places them."""
    place = sharding.place(mesh, model.rules)
    return {
        part: laid_out(shapes, {path: place(f"{part}/{path}", x) for path, x in shapes.items()})
        for part, shapes in (model.params | model.text_shapes).items()
    }


def training_state(
    model: Model, algorithm: Algorithm, advantage: Advantage, optimiser: Any, mesh: Mesh
) -> Any:
    """Return the shapes of the training state."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    memory = jax.eval_shape(lambda: advantage.initial(1))
    state = jax.eval_shape(
        lambda trained, memory, key: update.init(trained, algorithm.copies, memory, optimiser, key),
        model.trained_shapes,
        memory,
        key,
    )
    return laid_out(state, sharding.state_shardings(mesh, state, model.rules))


def empty_update(model: Model, algorithm: Algorithm, setup: Setup, mesh: Mesh) -> tuple[Any, Any]:
    """Return the shapes of an update's gradient and figures."""
    empty = partial(update.empty, algorithm, setup)
    gradient, figures = jax.eval_shape(empty, model.trained_shapes)
    gradient = laid_out(gradient, sharding.state_shardings(mesh, gradient, model.rules))
    return gradient, laid_out(figures, sharding.replicated(mesh))


def rollout(setup: Setup, micro_batch: int, latent: tuple[int, ...], mesh: Mesh) -> Rollout:
    """Return the shapes of a micro-batch's rollout."""
    rows, process = NamedSharding(mesh, sharding.ROWS), setup.process
    rows_second = NamedSharding(mesh, PartitionSpec(None, *sharding.ROWS))
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), micro_batch))
    return Rollout(
        latents=array(rows, micro_batch, *latent, dtype=jnp.float32),
        prompt=array(rows, micro_batch),
        keys=laid_out(keys, rows),
        start=array(sharding.replicated(mesh)),
        x=array(rows_second, process.recorded + 1, micro_batch, *latent, dtype=jnp.float32),
        log_prob=array(rows_second, process.window, micro_batch, dtype=jnp.float32),
    )


def conditionings(
    model: Model, text: Any, tokens: Any, prompts: tuple[int, ...], mesh: Mesh
) -> list[Any]:
    """Return the shapes of the conditioning of so many prompts each, on every device.

    Args:
      text: the shapes of the text encoders' weights; tokens: those of some prompts.
    """
    encoded, everywhere = jax.eval_shape(model.encode_text, text, tokens), sharding.replicated(mesh)

    def rows(x: Any, count: int) -> Any:
        return array(everywhere, count, *x.shape[1:], dtype=x.dtype)

    return [jax.tree.map(partial(rows, count=count), encoded) for count in prompts]
