"""Encode a run's prompts ahead of it, so that training needs no text encoder on its devices.

    python -m flowgrpo_jax.encode --config geneval --config.model.text_cache=texts

Fills `model.text_cache` with the prompts of the epochs, of the evaluation and the empty one.
`train` with the same cache then reads them there, and loads the text encoders only for a prompt
that it does not find. Which prompts an epoch has is known beforehand: it depends on nothing but
`seed`, `sample.groups` and the prompts' settings.
"""

from __future__ import annotations

from absl import flags
from ml_collections import ConfigDict
from tqdm import tqdm

from flowgrpo_jax import prompts, sharding
from flowgrpo_jax.assembly import parts, settings
from flowgrpo_jax.command_line import cli
from flowgrpo_jax.models import TEXTS
from flowgrpo_jax.storage import outputs


def needed(config: ConfigDict, epochs: int) -> list[str]:
    """Every prompt that training for `epochs` epochs encodes, once each."""
    train, test = parts.load_prompts(config, training=True)
    texts = [""]
    for epoch in range(epochs):
        texts += parts.draw_prompts(config, train, epoch).prompts
    if test and config.eval.every:
        texts += prompts.balanced(test, config.eval.images)[0].prompts
    return list(dict.fromkeys(texts))


def main(_: list[str]) -> None:
    cli.connect()
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
