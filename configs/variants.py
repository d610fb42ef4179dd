"""The variants of the recipes for SD3.5: NAME:fast and NAME:single_gpu."""

from ml_collections import ConfigDict


def fast(c: ConfigDict) -> None:
    """Flow-GRPO-Fast without guidance: 3 noisy steps of the first 5, one forward a step.

    Upstream's `geneval_sd3_fast_nocfg`. About a fifth of the full recipe's arithmetic. Without
    a KL term watch the rewards that are not trained on.
    """
    c.sample.kernel, c.sample.noise_level = "cps", 0.8
    c.sample.window, c.sample.window_range = 3, (0, 5)
    c.sample.guidance_scale = c.eval.guidance_scale = 1.0
    c.algorithm.options.clip_range = 1e-5
    # Weight of the KL to the policy before training; 0 spares its forward pass.
    c.algorithm.options.kl_beta = 0.0


def single_gpu(c: ConfigDict) -> None:
    """`fast` with a small evaluation; the epochs are the same, and take longer."""
    fast(c)
    c.eval.images, c.eval.every = 288, 20


VARIANTS = {"full": lambda c: None, "fast": fast, "single_gpu": single_gpu}


def variant(c: ConfigDict, name: str) -> ConfigDict:
    """The variant of a recipe that is in its full form. Raises ValueError for an unknown one."""
    if name not in VARIANTS:
        raise ValueError(f"{c.name}:{name}: choose a variant from {', '.join(VARIANTS)}")
    VARIANTS[name](c)
    c.name = c.name if name == "full" else f"{c.name}-{name}"
    return c
