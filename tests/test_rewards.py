"""The table of rewards: its rows against PIL's files and rendered scenes, and what names them."""

import ast
import re
from pathlib import Path

import numpy as np
import pytest
from noise_pictures import PICTURES
from PIL import Image

from flowgrpo_jax import rewards
from flowgrpo_jax.configs import ocr as ocr_recipe
from flowgrpo_jax.rewards import ocr, remote
from flowgrpo_jax.rewards import shapes as shapes_rewards
from flowgrpo_jax.worlds.shapes import grammar
from flowgrpo_jax.worlds.shapes.render import Thing, render

RNG = np.random.default_rng(0)


def score(name, images, metadata=None):
    """Scores of one reward, all of them valid."""
    metadata = metadata or [{}] * len(images)
    scores, valid = rewards.load([name])[name](images, [""] * len(images), metadata)
    assert scores.shape == valid.shape == (len(images),) and valid.all()
    return scores


def test_jpeg_is_the_size_of_the_file(tmp_path):
    flat = np.full((64, 64, 3), 200, np.uint8)
    ramp = np.broadcast_to(np.arange(64, dtype=np.uint8)[:, None, None] * 4, flat.shape)
    noise = RNG.integers(0, 256, size=flat.shape, dtype=np.uint8)
    pictures = np.stack([noise, flat, ramp])
    sizes = []
    for picture in pictures:
        Image.fromarray(picture).save(tmp_path / "picture.jpg", quality=95)
        sizes.append((tmp_path / "picture.jpg").stat().st_size)
    ours = score("jpeg_incompressibility", pictures)
    np.testing.assert_allclose(ours * 500_000, sizes, rtol=1e-6)
    assert ours[1] < ours[2] < ours[0]
    np.testing.assert_array_equal(score("jpeg_compressibility", pictures), -ours)


@pytest.mark.parametrize("tag", grammar.TAGS)
def test_shapes_pay_for_what_the_prompt_says(tag):
    pool = grammar.prompts("all", tag)
    asked = [pool[i] for i in RNG.choice(len(pool), 6, replace=False)]
    right = np.stack([render(grammar.sample_scene(m, RNG)) for m in asked])
    wrong = np.stack([render(grammar.sample_scene(grammar.garble(m, RNG), RNG)) for m in asked])
    assert (score("shapes", right, asked) == 1).all()
    assert (score("shapes_strict", right, asked) == 1).all()
    assert (score("shapes", wrong, asked) < 1).all()
    assert (score("shapes_strict", wrong, asked) == 0).all()
    assert (score("shapes_unknown", right) == 0).all()


def test_shapes_say_early_what_they_cannot_judge():
    for metadata in grammar.prompts("all"):
        shapes_rewards.graded.check(metadata)
    with pytest.raises(ValueError, match="need `include`"):
        shapes_rewards.strict.check({"prompt": "a red circle"})
    for clause, words in (
        ({"class": "dog", "count": 1}, "class must be one of .*'circle'"),
        ({"class": "star", "count": 9}, "count must be one of"),
        ({"class": "star"}, "count must be one of"),
        ({"class": "star", "count": 1, "color": "brown"}, "color must be one of .*'red'"),
        ({"class": "star", "count": 1, "position": ["inside", 0]}, "position must be one of"),
        ({"class": "star", "count": 1, "position": ["above", 0]}, "an earlier include clause"),
        ({"class": "star", "count": 1, "position": ["above"]}, "position must be one of"),
        ({"class": "star", "count": 1, "position": "above"}, "position must be one of"),
        ({"class": "star", "count": 2.0}, "count must be one of"),
        ("star", r"include=\['star'\]: must be a list"),
    ):
        with pytest.raises(ValueError, match=words):
            shapes_rewards.strict.check({"include": [clause]})
    star = {"class": "star", "count": 1}
    second = star | {"position": ["above", 0.0]}  # a number that went through a float column
    with pytest.raises(ValueError, match="an earlier include clause"):
        shapes_rewards.strict.check({"include": [star, second]})


def test_shapes_unknown_is_the_share_of_objects_without_a_shape():
    circle = render((Thing("circle", "red", 45.0, 45.0, 10.0),))
    bar, blank = render(()), render(())
    bar[5:11, 5:45] = (20, 20, 20)
    both = np.minimum(circle, bar)
    scores = score("shapes_unknown", np.stack([circle, bar, both, blank]))
    np.testing.assert_allclose(scores, [0, 1, 0.5, 0])


def test_an_unknown_name_is_an_error_that_lists_the_others():
    with pytest.raises(ValueError, match=r"'beauty' is unknown.*jpeg_compressibility.*shapes"):
        rewards.load(["shapes", "beauty"])


def test_the_ocr_recipe_evaluates_by_the_papers_rule_as_well(monkeypatch):
    """Full marks to what the paper's reward pays for and ours does not: the target, twice."""
    monkeypatch.setattr(ocr, "recogniser", lambda *_: lambda image: "STOP stop")
    config = ocr_recipe.get_config()
    made = rewards.load(config.eval.rewards, config.reward.options.to_dict())
    scores = {name: r(PICTURES[:1], ['a sign "Stop"'], [{}])[0][0] for name, r in made.items()}
    assert scores == {"ocr": 0, "ocr_exact": 0, "ocr_lenient": 1}


def test_an_option_that_a_reward_does_not_have_is_named():
    options = {"ocr": {"strict": True, "stricter": True}}
    with pytest.raises(ValueError, match=r"reward\.options of ocr, .*argument 'stricter'"):
        rewards.load(["ocr"], options)
    with pytest.raises(ValueError, match=r"reward\.options of geneval, .*argument 'detectr'"):
        rewards.load(["geneval"], {"geneval": {"detectr": "small"}})


def test_a_row_that_shares_options_may_have_its_own(monkeypatch):
    seen = []
    monkeypatch.setattr(ocr, "make", lambda **options: seen.append(options))
    rewards.load(["ocr_lenient", "ocr"], {"ocr": {"workers": 2, "strict": True}})
    rewards.load(["ocr_lenient"], {"ocr_lenient": {"workers": 3}, "ocr": {"workers": 2}})
    assert seen == [
        {"workers": 2, "strict": False, "exact": False},
        {"workers": 2, "strict": True},
        {"workers": 3, "strict": False, "exact": False},
    ]


def test_the_example_of_the_documentation(tmp_path, monkeypatch):
    """Its file and its row, taken from the page, are a reward."""
    page = (Path(__file__).parent.parent / "docs" / "rewards.md").read_text()
    file, row = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert file.startswith("# flowgrpo_jax/rewards/brightness.py") and len(file.splitlines()) <= 12
    (tmp_path / "brightness.py").write_text(file)
    monkeypatch.setattr(rewards, "__path__", [*rewards.__path__, str(tmp_path)])
    for name, place in ast.literal_eval("{" + row + "}").items():
        monkeypatch.setitem(rewards.TABLE, name, place)
    images = np.stack([np.full((4, 4, 3), level, np.uint8) for level in (0, 51, 255)])
    scores, valid = rewards.load(["brightness"])["brightness"](images, [""] * 3, [{}] * 3)
    np.testing.assert_allclose(scores, [0, 0.2, 1], rtol=1e-6)
    assert scores.dtype == np.float32 and valid.all()


def test_the_documentation_has_a_line_for_every_row():
    page = (Path(__file__).parent.parent / "docs" / "rewards.md").read_text()
    lines = [line.split("|") for line in page.splitlines() if line.startswith("| `")]
    listed = [name for line in lines for name in re.findall(r"`(\w+)`", line[1])]
    assert sorted(listed) == sorted(rewards.TABLE)
    for line in lines:  # a cost that was measured, or what it depends on
        assert re.search(r"\d (ms|GFLOP)|none more|request", line[-2]), line[1]


def test_a_row_may_be_used_several_times(monkeypatch):
    """Two servers: each under a name of its own, with what they share said once."""
    seen = []
    monkeypatch.setattr(remote, "make", lambda **options: seen.append(options) or len(seen))
    options = {
        "remote": {"secret_env": "S"},
        "remote:a": {"urls": ["http://a"]},
        "remote:b": {"urls": ["http://b"], "secret_env": "T"},
    }
    assert rewards.load(["remote:a", "remote:b"], options) == {"remote:a": 1, "remote:b": 2}
    assert seen == [
        {"secret_env": "S", "urls": ["http://a"]},
        {"secret_env": "T", "urls": ["http://b"]},
    ]
    with pytest.raises(ValueError, match="'far:a' cannot be imported"):
        rewards.load(["far:a"])
