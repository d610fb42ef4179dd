"""Human preference: PickScore with SD3.5-medium at 512 px, the third task of the Flow-GRPO paper.

    git clone --depth 1 https://github.com/yifan123/flow_grpo     # its prompts, read as they are
    python -m flowgrpo_jax.train --config configs/pickscore.py             # full: as the paper
    python -m flowgrpo_jax.train --config configs/pickscore.py:fast        # CPS window, no guidance
    python -m flowgrpo_jax.train --config configs/pickscore.py:single_gpu  # fast, on one device

Hardware and memory: as configs/geneval.py, and 4 GB for the reward's CLIP-H in float32. Any other
.txt of prompts does as well: --config.prompts.train=FILE --config.prompts.test=FILE.

Expected (paper): PickScore 21.72 to 23.31 with the KL, 23.41 without (the reward divides by 26:
0.835 to 0.897). Not run here with these weights. A preference model can be pleased by pictures
that people do not like: the evaluation measures rewards that are not trained on as well, and they
should not fall.
"""

from ml_collections import ConfigDict

from configs import base

PROMPTS = "flow_grpo/dataset/pickscore"


def get_config(variant: str = "full") -> ConfigDict:
    c = base.get_config()
    c.name = "pickscore"
    c.epochs = 1_000  # 2,000 optimiser steps

    c.prompts.train, c.prompts.test = f"{PROMPTS}/train.txt", f"{PROMPTS}/test.txt"
    c.sample.micro_batch = 288

    c.reward.weights = ConfigDict({"pickscore": 1.0})

    # Upstream's KL leaves |dt| out; "exact" wants about a tenth of this beta.
    c.train.kl_beta, c.train.kl_weighting = 0.01, "no_dt"

    c.eval.every = c.checkpoint.every = 60
    c.eval.images = 2_048  # every test prompt once
    c.eval.rewards = ("pickscore", "clipscore", "aesthetic", "hpsv2", "imagereward")
    return base.variant(c, variant)
