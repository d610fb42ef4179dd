"""The variants of the recipes for SD3.5: NAME:fast, NAME:single_gpu, NAME:nft and NAME:awm."""

from ml_collections import ConfigDict

from flowgrpo_jax.configs.algorithms import awm as bundled_awm
from flowgrpo_jax.configs.algorithms import nft as bundled_nft


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


def nft(c: ConfigDict) -> None:
    """DiffusionNFT with the settings of NVlabs/DiffusionNFT (config/nft.py) for this task.

    The ODE draws the images, without guidance. The solver is DPM-Solver++ of second order.
    """
    by_ode(c, steps=10)
    c.algorithm = bundled_nft.get_config().algorithm  # the options are the paper's
    c.advantage.name = "global"
    c.train.updates_per_epoch, c.train.ema_decay = 1, 0.9
    if c.name == "ocr":
        c.train.updates_per_epoch = 2
        slow = {"beta": 0.1, "old_flat": 75, "old_rate": 7.5e-3, "old_most": 0.999}
        c.algorithm.options.update(slow)


def awm(c: ConfigDict) -> None:
    """AWM with the settings of scxue/advantage_weighted_matching (config/dgx_awm.py) for this task.

    The ODE draws the images, without guidance, by DPM-Solver++ of second order. Theirs is
    SA-Solver, which adds noise of 0.4 at sigma between 0.3 and 0.9, but for PickScore. The script
    evaluates the policy after training as well as its EMA; here it is the EMA alone.
    """
    by_ode(c, steps=14)
    c.algorithm = bundled_awm.get_config().algorithm  # the options are the paper's
    c.advantage.name = "global"
    c.sample.groups = 72
    c.train.updates_per_epoch, c.train.ema_decay = 1, 0.99
    if c.name == "pickscore":
        c.sample.groups = 24
        c.algorithm.options.update({"kl_beta": 1e-4, "first": 0})


def by_ode(c: ConfigDict, *, steps: int) -> None:
    """Rollouts without noise and without guidance, and an evaluation without guidance."""
    c.sample.steps, c.sample.solver = steps, "dpmpp_2m"
    c.sample.guidance_scale = c.eval.guidance_scale = 1.0


VARIANTS = {
    "full": lambda c: None,
    "fast": fast,
    "single_gpu": single_gpu,
    "nft": nft,
    "awm": awm,
}


def variant(c: ConfigDict, name: str) -> ConfigDict:
    """The variant of a recipe that is in its full form. Raises ValueError for an unknown one."""
    if name not in VARIANTS:
        raise ValueError(f"{c.name}:{name}: choose a variant from {', '.join(VARIANTS)}")
    VARIANTS[name](c)
    c.name = c.name if name == "full" else f"{c.name}-{name}"
    return c
