"""Group rewards of the shapes world, on pictures that are drawn by its renderer."""

import numpy as np
import pytest

from flowgrpo_jax import rewards
from flowgrpo_jax.types import scope_of
from flowgrpo_jax.worlds.shapes import grammar
from flowgrpo_jax.worlds.shapes.render import COLORS, render

CIRCLES = [m for m in grammar.prompts("all", "colors") if m["prompt"].endswith("circle")]


def circles(*colors):
    """A picture of one circle of each colour."""
    rng = np.random.default_rng(0)
    by_color = {m["include"][0]["color"]: m for m in CIRCLES}
    return np.stack([render(grammar.sample_scene(by_color[color], rng)) for color in colors])


def call(name, images, record, scope="group"):
    reward = rewards.load([name])[name]
    assert scope_of(reward) == scope
    return reward(images, [record["prompt"]] * len(images), [record] * len(images))


def test_an_image_wins_against_the_worse_ones_of_its_prompt():
    red = next(m for m in CIRCLES if m["include"][0]["color"] == COLORS[0])
    right, wrong = COLORS[0], COLORS[1]
    scores, valid = call("shapes_wins", circles(right, wrong, right, wrong, wrong), red)
    # A right one beats three and ties with one of four; a wrong one loses to two, ties with two.
    assert valid.all() and scores.tolist() == pytest.approx([0.875, 0.25, 0.875, 0.25, 0.25])
    alone, _ = call("shapes_wins", circles(right), red)
    assert alone.tolist() == [0.0]


def test_all_images_alike_win_half_of_the_time():
    scores, _ = call("shapes_wins", circles(*COLORS[:1] * 6), CIRCLES[0])
    assert scores.tolist() == [0.5] * 6


def test_colours_are_balanced_when_each_is_used_alike():
    even, valid = call("shapes_balance", circles(*COLORS), CIRCLES[0])
    assert valid.all() and even.tolist() == pytest.approx([0.0] * len(COLORS))
    one, _ = call("shapes_balance", circles(*COLORS[:1] * 4), CIRCLES[0])
    n = len(COLORS)
    worst = -((1 - 1 / n) ** 2 + (n - 1) / n**2)
    assert one.tolist() == pytest.approx([worst] * 4)


def test_pictures_without_an_object_have_no_balance():
    blank = np.full((3, 64, 64, 3), 255, np.uint8)
    assert not call("shapes_balance", blank, CIRCLES[0])[1].any()


def test_fairness_is_what_an_image_adds_to_the_balance():
    """By the balance of the pictures with and without each one."""
    pictures = circles(*COLORS[:1] * 4, COLORS[1], COLORS[2], COLORS[2])
    found, valid = call("shapes_fairness", pictures, CIRCLES[0], "epoch")

    def balance(pictures):
        return call("shapes_balance", pictures, CIRCLES[0])[0][0]

    alone = [balance(np.delete(pictures, i, axis=0)) for i in range(7)]
    np.testing.assert_allclose(found, 7 * (balance(pictures) - np.array(alone)), atol=1e-5)
    assert valid.all() and found[4] > found[5] > 0 > found[0]


def test_a_picture_without_an_object_adds_nothing_to_the_balance():
    blank = np.full((2, 64, 64, 3), 255, np.uint8)
    found, valid = call("shapes_fairness", blank, CIRCLES[0], "epoch")
    assert valid.all() and not found.any()
    pictures = circles(COLORS[0], COLORS[0], COLORS[1])
    mixed, _ = call("shapes_fairness", np.concatenate([pictures, blank]), CIRCLES[0], "epoch")
    rest, _ = call("shapes_fairness", pictures, CIRCLES[0], "epoch")
    np.testing.assert_allclose(mixed, [*rest, 0, 0], atol=1e-6)
