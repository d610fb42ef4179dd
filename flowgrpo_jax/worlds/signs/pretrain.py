"""Make the model of the signs world.

python -m flowgrpo_jax.worlds.signs.pretrain --workdir DIR
"""

from flowgrpo_jax import cli, user_errors
from flowgrpo_jax.worlds.pretraining import run
from flowgrpo_jax.worlds.signs.world import WORLD

if __name__ == "__main__":
    cli.restart_with_huge_pages()
    with user_errors.in_one_line():
        run.main(WORLD)
