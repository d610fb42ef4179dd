"""The noise of gradients, on gradients whose noise is known."""

import numpy as np
import pytest
from ml_collections import ConfigDict
from short_runs import load

from benchmarks import noise_scale
from flowgrpo_jax.assembly.run import build_run

SIZE, IMAGES = 20_000, 10


def drawn(direction, spread, epochs, seed):
    """Gradients of epochs: a direction [D] plus the mean of IMAGES images' noise, each of standard
    deviation `spread` in every coordinate."""
    noise = np.random.default_rng(seed).normal(scale=spread, size=(epochs, len(direction)))
    return direction + noise / np.sqrt(IMAGES)


@pytest.fixture
def direction():
    """Of length 1."""
    x = np.random.default_rng(1).normal(size=SIZE)
    return x / np.linalg.norm(x)


def test_the_noise_scale_is_the_noise_of_an_image_over_the_squared_gradient(direction):
    """tr(Sigma) = D spread^2 and |G| = 1."""
    spread = 0.05
    found = drawn(direction, spread, epochs=40, seed=2)
    assert noise_scale.squared_length(found) == pytest.approx(1, rel=0.1)
    share = noise_scale.cosine(found)
    assert share == pytest.approx(1 / (1 + SIZE * spread**2 / IMAGES), rel=0.1)
    assert noise_scale.noise_scale(share, IMAGES) == pytest.approx(SIZE * spread**2, rel=0.1)


def test_without_noise_gradients_agree_and_no_image_is_needed(direction):
    found = np.stack([direction] * 3)
    assert noise_scale.cosine(found) == pytest.approx(1)
    assert noise_scale.noise_scale(1.0, IMAGES) == 0
    assert noise_scale.error(noise_scale.cosine, found) == pytest.approx(0, abs=1e-9)


def test_noise_alone_has_no_direction():
    found = drawn(np.zeros(SIZE), 1.0, epochs=6, seed=3)
    assert abs(noise_scale.cosine(found)) < 0.02
    opposite = np.stack([found[0], -found[0]])
    assert noise_scale.noise_scale(noise_scale.cosine(opposite), IMAGES) is None
    assert np.isnan(noise_scale.agreement(opposite, found))


@pytest.mark.parametrize("angle", [0, 60, 90, 180])
def test_the_agreement_is_the_angle_behind_the_noise(direction, angle):
    """Also where the noise is ten times as long as what it hides, and the scales differ."""
    other = np.random.default_rng(4).normal(size=SIZE)
    other -= (other @ direction) * direction
    other /= np.linalg.norm(other)
    turned = np.cos(np.radians(angle)) * direction + np.sin(np.radians(angle)) * other
    a = drawn(direction, 0.07, epochs=30, seed=5)
    b = 3 * drawn(turned, 0.07, epochs=30, seed=6)
    expected = np.cos(np.radians(angle))
    assert noise_scale.agreement(a, b) == pytest.approx(expected, abs=0.15)


def test_the_error_of_a_mean_is_its_standard_error():
    x = np.random.default_rng(7).normal(size=(12, 1))
    expected = x.std(ddof=1) / np.sqrt(len(x))
    assert noise_scale.error(lambda x: float(x.mean()), x) == pytest.approx(expected)


def constant(images, prompts, metadata):
    return np.ones(len(images))


def test_images_have_a_gradient_unless_all_have_the_same_reward(runs):
    """The reward of the recipe is the size of their files, which differs."""
    config = load(runs, prompts__test="")
    assert np.linalg.norm(noise_scale.gradients(build_run(config), epochs=2), axis=1).min() > 0
    config.reward.weights = ConfigDict({"test_noise_scale:constant": 1.0})
    config.eval.rewards, config.checkpoint.best = (), ""
    assert not noise_scale.gradients(build_run(config), epochs=2).any()


def test_too_few_images_are_refused():
    with pytest.raises(ValueError, match=r"--images=288: 1 epochs of grpo.* at least 3"):
        noise_scale.measure("grpo", 0, 288, None)


def test_the_table_leaves_out_what_is_not_known():
    row = {"images_an_epoch": 288, "epochs": 8, "cosine": 0.25, "cosine_error": 0.01}
    known = {
        **row,
        "noise_scale": 864.0,
        "noise_scale_least": 780.4,
        "noise_scale_forwards": 25_056.0,
    }
    unknown = {**row, **dict.fromkeys(list(known)[4:]), "agreement": 0.5, "agreement_error": 0.2}
    text = noise_scale.table({"a": known, "b": unknown})
    assert text.splitlines()[2:] == [
        "| a | 288 | 8 | 0.250 ± 0.010 | 864 | 780 | 25,056 |  |",
        "| b | 288 | 8 | 0.250 ± 0.010 |  |  |  | 0.50 ± 0.20 |",
    ]
