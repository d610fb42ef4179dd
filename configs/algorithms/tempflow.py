"""TempFlow-GRPO on the bundled model: `configs/shapes.py` with a branch step for each part.

    python -m flowgrpo_jax.train --config algorithms/tempflow
    python -m flowgrpo_jax.train --config algorithms/tempflow:capped

Six images of a prompt follow one path of the ODE up to the branch step, which is computed once,
take a stochastic step there, each with its own noise, and go on by the ODE: their scores differ by
that step alone. As in the paper (arXiv 2508.04324) every prompt is branched at every step, the
first ten of 20 here, with advantages of their own for each. The paper has 4 paths of 6 branches for
a prompt and step; here they are 2, of 4 prompts an epoch, without the paper's KL. `capped` branches
8 prompts at three steps that are drawn for each epoch, much as Tencent-Hunyuan/UniRL does, whose
three move on.
"""

from ml_collections import ConfigDict

from flowgrpo_jax.configs import shapes


def get_config(variant: str = "full") -> ConfigDict:
    """Raises ValueError for an unknown variant."""
    if variant not in ("full", "capped"):
        raise ValueError(f"tempflow:{variant}: choose a variant from full, capped")
    c = shapes.get_config()
    c.name = "shapes-tempflow" if variant == "full" else "shapes-tempflow-capped"
    c.sample.kernel, c.sample.noise_level = "flow_sde", 0.7
    c.algorithm.options.step_weight = "tempflow"
    c.sample.window, c.sample.window_range = 1, (0, 10)
    c.sample.branches, c.sample.same_prompts = 6, True
    c.sample.groups, c.sample.micro_batch, c.sample.windows = 40, 48, 10
    c.sample.window_schedule = "each"
    if variant == "capped":
        c.sample.groups, c.sample.micro_batch, c.sample.windows = 24, 96, 3
        c.sample.window_schedule = "distinct"
    return c
