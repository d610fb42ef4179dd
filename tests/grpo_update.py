"""GRPO with options of its own, and the state that its update starts from."""

from linear_policy import KEY

from flowgrpo_jax import algorithms, update
from flowgrpo_jax.sampling import sde

SIGMAS = tuple(sde.sigma_schedule(5).tolist())


def grpo(clip_range, **options):
    return algorithms.load("grpo", {"clip_range": clip_range, **options})


def start(params, tx, algorithm):
    return update.init(params, algorithm.copies, {}, tx, KEY)


KL = grpo(0.2, kl_beta=0.5)
