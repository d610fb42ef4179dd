"""Make the model of the signs world.

python -m flowgrpo_jax.worlds.signs.pretrain --workdir DIR
"""

from flowgrpo_jax.compilation import huge_pages

if __name__ == "__main__":
    huge_pages.restart()  # before the imports below, which take seconds

from flowgrpo_jax.command_line import user_errors
from flowgrpo_jax.worlds.pretraining import run
from flowgrpo_jax.worlds.signs.world import WORLD

if __name__ == "__main__":
    with user_errors.in_one_line():
        run.main(WORLD)
