"""Rendered text in miniature: short words on signs, read by PP-OCR.

    python -m flowgrpo_jax.train --config signs

Hardware: 2 CPU cores, 10 s an epoch, of which OCR takes two thirds. Needs the reader,
pip install 'flowgrpo_jax[ocr]'. Settings are those of configs/shapes.py but for the prompts and the
reward, which nobody here wrote. docs/results.md says what to expect.

Pictures have 64 px: they are enlarged to 256 px, and the detector looks at them at that size. A
picture then takes 32 ms on one core instead of 240, and all of 160 rendered signs were read right,
words as well as random letters; of no sign, nothing was read.
"""

from ml_collections import ConfigDict

from flowgrpo_jax.configs import shapes


def get_config() -> ConfigDict:
    c = shapes.get_config()
    c.name = "signs"
    c.epochs = 40

    c.model.path = "signs"

    c.prompts.train, c.prompts.test = "signs:train", "signs:test"
    c.prompts.tag_weights = ConfigDict()

    c.reward.weights = ConfigDict({"ocr": 1.0})
    c.reward.options = ConfigDict({"ocr": {"upscale": 4, "detector_side": 256}})

    c.eval.rewards = ("ocr", "ocr_exact")
    c.eval.every = c.checkpoint.every = 10
    c.checkpoint.best = "ocr"
    return c
