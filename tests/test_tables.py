"""Rows of the user's own, named "package.module:attribute" wherever a table's name is taken."""

import importlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from flowgrpo_jax import advantages, algorithms, prompts, rewards, tables
from flowgrpo_jax.assembly import settings
from flowgrpo_jax.sampling import sde

OWN = """
import dataclasses
import numpy as np
from flowgrpo_jax import advantages, algorithms
from flowgrpo_jax.sampling import sde

def brightness(images, prompts, metadata):
    return images.mean((1, 2, 3)) / 255, np.ones(len(images), bool)

def scaled(factor=1.0):
    return lambda images, p, m: (factor * images.mean((1, 2, 3)), np.ones(len(images), bool))

def algorithm(clip_range=0.5):
    return algorithms.load("grpo", {"clip_range": clip_range})

def signs_alone(group_size, clip):
    def compute(memory, scores, weights, ids):
        total, _ = advantages.weighted(scores, weights)
        return np.sign(total - total.mean()), memory
    return advantages.Advantage(compute)

QUIET = sde.Kernel(sde.cps, most_noise=0.1)

def colours(split, exclude):
    return [{"prompt": f"a {c} wall", "tag": split} for c in ("red", "blue")]

def nothing(split, exclude):
    return [{"text": "no prompt"}]
"""


@pytest.fixture(autouse=True)
def own(tmp_path, monkeypatch):
    """A module in the folder that a command is started in."""
    (tmp_path / "my_rows.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    yield
    sys.modules.pop("my_rows", None)


def test_a_reward_of_ones_own():
    images = np.full((2, 4, 4, 3), 51, np.uint8)
    names = ["my_rows:brightness", "my_rows:scaled()"]
    found = rewards.load(names, {"my_rows:scaled()": {"factor": 2.0}})
    np.testing.assert_allclose(found[names[0]](images, [], [])[0], 0.2)
    np.testing.assert_allclose(found[names[1]](images, [], [])[0], 102)


def test_an_algorithm_an_advantage_and_a_kernel_of_ones_own():
    algorithm = algorithms.load("my_rows:algorithm", {"clip_range": 0.25})
    assert algorithm.records == "window" and "clip 0.25" in algorithm.summary
    row = advantages.load("my_rows:signs_alone", {}, group_size=2, clip=5.0)
    scores = jnp.array([[1.0, 2.0]])
    advantage, _ = row.compute({}, scores, jnp.ones_like(scores), jnp.arange(1))
    np.testing.assert_array_equal(advantage, [-1, 1])
    assert sde.load("my_rows:QUIET").most_noise == 0.1


def test_prompts_of_ones_own():
    found = prompts.load("my_rows:colours:test")
    assert [r["prompt"] for r in found] == ["a red wall", "a blue wall"]
    assert found[0]["tag"] == "test"
    with pytest.raises(ValueError, match=r"my_rows:nothing:train.*record 0.*'prompt'"):
        prompts.load("my_rows:nothing:train")


def test_a_recipe_of_rows_of_ones_own_is_sound():
    from flowgrpo_jax.configs import shapes

    config = shapes.get_config()
    config.algorithm = ConfigDict({"name": "my_rows:algorithm", "options": {}})
    config.advantage.name = "my_rows:signs_alone"
    config.sample.kernel, config.sample.noise_level = "my_rows:QUIET", 0.05
    config.reward.weights = ConfigDict({"my_rows:brightness": 1.0})
    config.eval.rewards, config.checkpoint.best = (), ""
    settings.check(config)
    config.sample.noise_level = 0.6
    with pytest.raises(ValueError, match=r"noise_level=0\.6: my_rows:QUIET takes at most 0\.1"):
        settings.check(config)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"size": 3}, r"what: size is unknown; .* takes rate=0.5, count=2, on=False, kind='a'$"),
        ({"shared": 3}, r"what: shared is unknown"),
        ({"count": 2.5}, r"what: count=2.5 must be of the type of its default, 2"),
        ({"count": True}, r"what: count=True must"),
        ({"rate": "x"}, r"what: rate='x' must"),
        ({"on": "no"}, r"what: on='no' must"),
        ({"kind": None}, r"what: kind=None must"),
    ],
)
def test_options_are_known_and_of_the_type_of_their_defaults(options, message):
    def factory(shared, rate=0.5, count=2, on=False, kind="a"):
        return shared, rate, count, on, kind

    with pytest.raises(ValueError, match=message):
        tables.make(factory, options, "what", shared=1)
    assert tables.make(factory, {"rate": 1, "on": True}, "what", shared=1) == (1, 1, 2, True, "a")


def test_options_of_another_algorithm_name_the_recipe_of_the_chosen_one():
    with pytest.raises(ValueError, match=r"clip_range is unknown.*--config algorithms/nft sets"):
        algorithms.load("nft", {"clip_range": 1e-3})


def test_a_row_of_another_kind_is_named():
    from flowgrpo_jax import advantages, algorithms, models
    from flowgrpo_jax.sampling import sde, solvers

    for load in (sde.load, solvers.load):
        with pytest.raises(ValueError, match=r"'os:getcwd' gives a builtin.*, it must be a .*\."):
            load("os:getcwd")
    with pytest.raises(
        ValueError, match=r"'os:getcwd' gives a .*must be a flowgrpo_jax\.models\.F"
    ):
        models.find("shapes", "os:getcwd")
    with pytest.raises(ValueError, match=r"'os:getcwd' gives a str, it must be a .*Algorithm"):
        algorithms.load("os:getcwd", {})
    with pytest.raises(ValueError, match=r"advantage\.options of os:path: <module .* no function"):
        advantages.load("os:path", {}, group_size=4, clip=5.0)


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("nft", {"old_rate": -1.0}, r"old_rate=-1.0: must be at least 0"),
        ("awm", {"anchor_most": 2.0}, r"anchor_most=2.0: must be in \[0, 1\)"),
        ("awm", {"kl_beta": -1.0}, r"kl_beta=-1.0: must be at least 0"),
        ("dgpo", {"average_most": 2.0}, r"average_most=2.0: must be in"),
        ("crd", {"drawer_rate": -1.0}, r"drawer_rate=-1.0: must be at least 0"),
        ("nft", {"anchor": -1.0}, r"anchor=-1.0: must be at least 0"),
    ],
)
def test_copies_cannot_be_made_to_diverge(name, options, message):
    from flowgrpo_jax import algorithms

    with pytest.raises(ValueError, match=message):
        algorithms.load(name, options)


def test_a_package_with_dots_names_a_reward_in_a_recipe():
    from flowgrpo_jax.configs import shapes

    config = shapes.get_config()
    weights = {"numpy.linalg:norm": 1.0}
    config.reward.weights = ConfigDict(weights, allow_dotted_keys=True)
    assert config.reward.weights.to_dict() == weights
    assert rewards.row_of("numpy.linalg:norm") == "numpy.linalg:norm"


@pytest.mark.parametrize(
    "name, problem",
    [
        ("brightness", r"reward 'brightness' is unknown: choose from .*'package\.module:function'"),
        ("my_rows:darkness", r"cannot be imported: .*darkness.*folder that holds my_rows"),
        ("their_rows:brightness", r"cannot be imported: No module named 'their_rows'"),
    ],
)
def test_a_reward_that_is_not_there_is_named(name, problem):
    with pytest.raises(ValueError, match=problem):
        rewards.load([name])


def test_an_error_inside_a_row_of_the_package_is_not_hidden():
    with pytest.raises(ModuleNotFoundError):
        tables.find({"broken": "flowgrpo_jax.nothing_here:make"}, "broken", "algorithm")


def test_a_second_model_of_the_same_settings_shares_its_programs():
    """The functions of two descriptions are the same object, so that nothing is traced again."""
    from flowgrpo_jax import programs, sharding
    from flowgrpo_jax.models import sd3
    from flowgrpo_jax.sampling import sampler

    parts = sd3.find_architecture("shapes")
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    made = []
    for _ in range(2):
        model = sd3.describe(parts, t5_length=10, gather=sharding.gather_weights(mesh, sd3.RULES))
        settings_of = {"latent": (8, 8, 16), "sigmas": (1.0, 0.5, 0.0)}
        made.append(
            programs.generate(
                sampler.guided(model.velocity, 1.0), model.decode, mesh, **settings_of
            )
        )
    assert made[0] is made[1]
