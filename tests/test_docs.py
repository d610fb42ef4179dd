"""The documentation: its links lead somewhere, and the examples of docs/extending.md work."""

import importlib
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import rankdata

from flowgrpo_jax import advantages, algorithms, rewards, sharding
from flowgrpo_jax.algorithms import Setup
from flowgrpo_jax.assembly import settings
from flowgrpo_jax.command_line import knobs
from flowgrpo_jax.command_line.stop import Stop
from flowgrpo_jax.sampling import sampler, sde
from flowgrpo_jax.sampling.sampler import Process
from flowgrpo_jax.scoring.pending import PendingScores
from flowgrpo_jax.scoring.reward_weights import RewardWeights
from flowgrpo_jax.scoring.scorer import Scorer
from flowgrpo_jax.types import Credit, Pictures

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGE = (ROOT / "docs" / "extending.md").read_text()


@pytest.fixture(autouse=True)
def examples(tmp_path, monkeypatch):
    """The files of the page, in the folder that a command is started in."""
    names = []
    for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
        name = re.match(r"# (my_\w+)\.py\n", block)[1]
        (tmp_path / f"{name}.py").write_text(block)
        names.append(name)
    assert names == [
        "my_recipe",
        "my_geneval_dgpo",
        "my_reward",
        "my_group_reward",
        "my_algorithm",
        "my_advantage",
        "my_kernel",
    ]
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    yield
    for name in names:
        sys.modules.pop(name, None)


def named(name):
    """The name of a row, which the page gives as the value of a knob."""
    assert f'"{name}"' in PAGE
    return name


def test_the_recipe_of_the_page(tmp_path):
    assert "--config my_recipe.py\n" in PAGE
    own, shapes = knobs.load(str(tmp_path / "my_recipe.py")), knobs.load("shapes")
    changed = {knob: value for knob, value in own.items() if value != shapes.get(knob)}
    assert changed == {"name": "bright", "epochs": 20, "reward.weights.my_reward:brightness": 1.0}
    settings.check(importlib.import_module("my_recipe").get_config())


def test_the_page_has_another_algorithm_for_sd35(tmp_path):
    own = importlib.import_module("my_geneval_dgpo").get_config()
    settings.check(own)
    assert own.algorithm.name == "dgpo"
    assert own.model.path == "stabilityai/stable-diffusion-3.5-medium"


def test_the_reward_of_the_page():
    images = np.stack([np.full((4, 4, 3), level, np.uint8) for level in (0, 51, 255)])
    name = named("my_reward:brightness")
    scores, valid = rewards.load([name])[name](images, [""] * 3, [{}] * 3)
    np.testing.assert_allclose(scores, [0, 0.2, 1], rtol=1e-6)
    assert valid.all()


def test_the_group_reward_of_the_page():
    name = named("my_group_reward:rank")
    (reward,) = rewards.load([name]).values()
    levels = np.array([[7, 1], [200, 2], [3, 250], [90, 9], [40, 8]])  # [image, prompt]
    images = np.broadcast_to(levels.reshape(10, 1, 1, 1), (10, 4, 4, 3)).astype(np.uint8)
    ids = np.tile([0, 1], 5)  # the images of the two prompts take turns
    records = [{"prompt": "a"}, {"prompt": "b"}]
    mesh = sharding.make_mesh()
    scorer = Scorer(RewardWeights({name: 1.0}), {name: reward}, records, mesh)
    shown = sharding.split_rows(mesh, (images, np.ones(10, bool)))
    with PendingScores(scorer, ids) as pending:
        pending.add(Pictures(*shown), {}, ids)
        scores = pending.collect(Stop().wait)
    wanted = (rankdata(levels, axis=0) - 1) / 4
    np.testing.assert_allclose(scores.values[0].reshape(5, 2), wanted, rtol=1e-6)


def test_the_algorithm_of_the_page():
    """Its minimum over constant velocities is the weighted mean of the targets, so that a velocity
    that equals the target of every image has no loss."""
    algorithm = algorithms.load(named("my_algorithm:make"), {"temperature": 0.5})
    setup = Setup(Process((1.0, 0.8, 0.5, 0.0)), group_size=2)
    places = jnp.arange(2)
    keys = sampler.image_keys(jax.random.key(0), 0, places, places)
    images = jnp.zeros((2, 2, 2, 1))
    rollout = sampler.rollout(lambda x, s: 0 * x, setup.process, images, keys, 0, places)
    np.testing.assert_array_equal(algorithm.terms(setup, jax.random.key(0)), [0, 1])

    def loss(velocity, advantage):
        return algorithm.loss(setup, {"policy": velocity}, rollout, jnp.int32(1), Credit(advantage))

    def exact(x, sigma):  # x = sigma noise, whose target is the noise
        return x / sigma[:, None, None, None]

    value, _ = loss(exact, jnp.zeros(2))
    np.testing.assert_allclose(value, 0, atol=1e-12)
    value, figures = loss(lambda x, s: exact(x, s) + 2, jnp.array([0.0, 0.5]))
    np.testing.assert_allclose(value, [4, 4 * np.e], rtol=1e-5)
    assert set(figures) == set(algorithm.figures)
    with pytest.raises(ValueError, match=r"temperature=0: must be above 0"):
        algorithms.load("my_algorithm:make", {"temperature": 0})


def test_the_advantage_of_the_page():
    row = advantages.load(named("my_advantage:rank"), {}, group_size=5, clip=5.0)
    scores = np.random.default_rng(0).normal(size=(1, 10)).astype(np.float32)
    found, _ = row.compute({}, jnp.asarray(scores), jnp.ones((1, 10)), jnp.arange(2))
    wanted = (rankdata(scores.reshape(2, 5), axis=1) - 3) / 2
    np.testing.assert_allclose(found.reshape(2, 5), wanted, atol=1e-6)
    scores[0, 3] = np.nan
    found, _ = row.compute({}, jnp.asarray(scores), jnp.ones((1, 10)), jnp.arange(2))
    assert found[3] == 0 and np.isfinite(found).all()


def test_the_kernel_of_the_page():
    kernel = sde.load(named("my_kernel:CONSTANT"))
    x, v = jnp.full((1, 2, 2, 1), 2.0), jnp.ones((1, 2, 2, 1))
    mean, std = kernel.gaussian(x, v, 0.5, 0.25, noise_level=0.4, sigma_max=0.9)
    np.testing.assert_allclose(mean, 1.75)
    np.testing.assert_allclose(std, 0.2, rtol=1e-6)
    assert kernel.most_noise == 0.5


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_to_a_file(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    linked = [t for t in re.findall(r"\]\(([^)#]+)\)", text) if not t.startswith("http")]
    named_pages = re.findall(r"`((?:docs|configs|launch)/[\w/-]+\.(?:md|py|sh))`", text)
    missing = [t for t in linked if not (page.parent / t).exists()]
    assert not missing + [t for t in named_pages if not (ROOT / t).exists()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_lines_are_short(page):
    """Rows of tables and code cannot be broken."""
    lines = page.read_text().splitlines()
    assert not [line for line in lines if len(line) > 110 and not line.startswith(("|", "    "))]
