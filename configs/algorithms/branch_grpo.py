"""BranchGRPO on the bundled model: `configs/shapes.py` with a tree of stochastic steps a prompt.

    python -m flowgrpo_jax.train --config algorithms/branch_grpo
    python -m flowgrpo_jax.train --config algorithms/branch_grpo:pruned

The images of a prompt start from one noise. At steps 0, 3, 6 and 9 of 20 each path splits into two,
with four times the noise, so that there are 16 at the end (arXiv 2509.06040, with the constants of
Fredreic1849/BranchGRPO). The paths' other steps are stochastic as well, but for the last three,
where this kernel would leave too much noise on this schedule; upstream's has no such steps.
`pruned` trains 8 leaves of each tree after the last split, and leaves out 4 steps. The learning
rate and the clip range are those of `configs/shapes.py`, the paper's are 1e-5 and 1e-3.
"""

from ml_collections import ConfigDict

from flowgrpo_jax.configs import shapes


def get_config(variant: str = "full") -> ConfigDict:
    """Raises ValueError for an unknown variant."""
    if variant not in ("full", "pruned"):
        raise ValueError(f"branch_grpo:{variant}: choose a variant from full, pruned")
    c = shapes.get_config()
    c.name = "shapes-branch-grpo" if variant == "full" else "shapes-branch-grpo-pruned"
    c.sample.groups, c.sample.group_size = 18, 16
    c.sample.kernel, c.sample.noise_level = "dance", 0.3
    c.sample.window, c.sample.window_range = 17, (0, 0)
    c.sample.branches, c.sample.splits, c.sample.split_noise = 16, (0, 3, 6, 9), 4.0
    c.advantage.name = "tree"
    c.advantage.options = ConfigDict({"fusion": "mean"})
    if variant == "pruned":
        c.advantage.options = ConfigDict({"prune": 4, "prune_every": 30, "keep_leaves": 8})
    return c
