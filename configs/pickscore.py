"""Human preference: PickScore with SD3.5-medium at 512 px, the third task of the Flow-GRPO paper.

    git clone --depth 1 https://github.com/yifan123/flow_grpo     # its prompts, read as they are
    python -m flowgrpo_jax.train --config pickscore             # full: as the paper
    python -m flowgrpo_jax.train --config pickscore:fast        # CPS window, no guidance
    python -m flowgrpo_jax.train --config pickscore:single_gpu  # fast, on one device
    python -m flowgrpo_jax.train --config pickscore:nft         # DiffusionNFT in place of GRPO
    python -m flowgrpo_jax.train --config pickscore:awm         # AWM

Hardware and memory: as configs/geneval.py, without a detector, and on every device 11 GB more for
the rewards in float32: 4 for PickScore's CLIP-H, and for the evaluation 4 for HPSv2's, 2 for
ImageReward and 2 for the CLIP-L of the other two; --config.eval.rewards="('pickscore',)" does
without those. Any other .txt of prompts does as well: --config.prompts.train=FILE
--config.prompts.test=FILE.

Expected (paper): PickScore 21.72 to 23.31 with the KL, 23.41 without (the reward divides by 26:
0.835 to 0.897). Not run here with these weights. A preference model can be pleased by pictures
that people do not like: the evaluation measures rewards that are not trained on as well, and they
should not fall.
"""

from ml_collections import ConfigDict

from flowgrpo_jax.configs import base, variants

PROMPTS = "flow_grpo/dataset/pickscore"
CLIP_L, CLIP_H = "openai/clip-vit-large-patch14", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"


def get_config(variant: str = "full") -> ConfigDict:
    c = base.get_config()
    c.name = "pickscore"
    c.epochs = 1_000  # 2,000 optimiser steps

    c.prompts.train, c.prompts.test = f"{PROMPTS}/train.txt", f"{PROMPTS}/test.txt"

    c.reward.weights = ConfigDict({"pickscore": 1.0})
    c.reward.options = ConfigDict(
        {  # path, head: a folder, a file or a hub id; tokenizer: where none is beside the weights
            "pickscore": {
                "path": "yuvalkirstain/PickScore_v1",
                "dtype": "float32",  # or bfloat16, float16: of the weights and the computation
                "tokenizer": CLIP_H,
            },
            "clipscore": {"path": CLIP_L, "dtype": "float32"},
            "aesthetic": {
                "path": CLIP_L,
                "head": "trl-lib/ddpo-aesthetic-predictor",
                "dtype": "float32",
            },
            "hpsv2": {"path": "xswu/HPSv2", "dtype": "float32", "tokenizer": CLIP_H},
            "imagereward": {
                "path": "THUDM/ImageReward",
                "dtype": "float32",
                "tokenizer": "google-bert/bert-base-uncased",
            },
        }
    )

    # Upstream's KL leaves |dt| out; "exact" wants about a tenth of this beta.
    c.algorithm.options.kl_beta, c.algorithm.options.kl_weighting = 0.01, "no_dt"

    c.eval.every = c.checkpoint.every = 60
    c.eval.images = 2_048  # every test prompt once
    c.eval.rewards = ("pickscore", "clipscore", "aesthetic", "hpsv2", "imagereward")
    c.checkpoint.best = "pickscore"
    return variants.variant(c, variant)
