"""Encode a run's prompts ahead of it, so that training needs no text encoder on its devices.

    python -m flowgrpo_jax.encode --config geneval --config.model.text_cache=texts

Fills `model.text_cache` with the prompts of the epochs, of the evaluation and the empty one, and
with the captions of the loss on data and of the monitored pictures. `train` with the same cache
then reads them there, and loads the text encoders only for a prompt that it does not find. Which
prompts and captions an epoch has is known beforehand: it depends on nothing but `seed`, the sizes
of the batch and the settings of the prompts and the data.
"""

from __future__ import annotations

from collections.abc import Iterator

from absl import flags
from ml_collections import ConfigDict
from tqdm import tqdm

from flowgrpo_jax import prompts, sharding
from flowgrpo_jax.assembly import batch_plan, parts, settings
from flowgrpo_jax.command_line import cli, connection
from flowgrpo_jax.models import TEXTS
from flowgrpo_jax.monitors import true_loss
from flowgrpo_jax.storage import outputs


def needed(config: ConfigDict, epochs: int) -> list[str]:
    """Every prompt that training for `epochs` epochs encodes, once each."""
    train, test = parts.load_prompts(config, training=True)
    texts = [""]
    for epoch in range(epochs):
        texts += parts.draw_prompts(config, train, epoch).prompts
    texts += _captions(config, epochs)
    if test and config.eval.every:
        texts += prompts.balanced(test, config.eval.images)[0].prompts
        texts += _watched(config)
    return list(dict.fromkeys(texts))


def _captions(config: ConfigDict, epochs: int) -> Iterator[str]:
    """Yield the captions of the loss on data, whose pictures are drawn as training draws them."""
    plan = batch_plan.make_plan(config, 1)
    data = parts.make_data(config, plan, 1)
    if data is None or data.source is None:  # the base's own samples, for the epoch's prompts
        return
    count = data.images * data.steps(plan.updates)
    for epoch in filter(data.falls_on, range(epochs)):
        yield from data.source(count, config.seed, epoch).captions


def _watched(config: ConfigDict) -> list[str]:
    """Return the captions of the pictures whose loss every evaluation measures."""
    source = config.monitor.pictures
    return true_loss.load(source, config.model.height, config.model.width)[1] if source else []


def main(_: list[str]) -> None:
    connection.connect()
    config = cli.config()
    settings.check(config)
    if not config.model.text_cache:
        raise ValueError("config.model.text_cache is empty: say where to keep the encoded prompts")
    outputs.check_directory(config.model.text_cache, "--config.model.text_cache")
    mesh = sharding.make_mesh(**config.mesh)
    texts = needed(config, flags.FLAGS.epochs or config.epochs)
    with cli.compiling():
        model = parts.load_model(config, mesh, texts_alone=True)
        for i in tqdm(range(0, len(texts), TEXTS), desc="encode", unit="batch"):
            parts.encode(config, model, mesh, texts[i : i + TEXTS], strict=True)
    print(f"{len(texts)} prompts are in {config.model.text_cache}")


if __name__ == "__main__":
    cli.define_flags(config=True)
    cli.define_cache_flag()
    note = "How many epochs to encode the prompts of; 0: all of config.epochs."
    flags.DEFINE_integer("epochs", 0, note, lower_bound=0)
    cli.run(main)
