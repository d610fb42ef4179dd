"""Options of algorithms that make no sense are errors that name the value and the fix."""

import pytest
from linear_policy import KEY, setup_of

from flowgrpo_jax import algorithms


@pytest.mark.parametrize(
    "name, options, problem",
    [
        (
            "ppo",
            {},
            r"'ppo' is unknown: choose from awm, crd, dgpo, dpo, draft, draft_lv",
        ),
        ("nft", {"clip_range": 1}, r"clip_range is unknown; .*nft takes beta=1.0"),
        ("grpo", {"clip_range": 0.0}, r"clip_range=0.0: must be above 0"),
        ("grpo", {"kl_beta": -0.1}, r"kl_beta=-0.1: must be at least 0"),
        ("grpo", {"kl_weighting": "dt"}, r"kl_weighting='dt': choose from 'exact', 'no_dt'"),
        ("grpo", {"step_choice": "last"}, r"step_choice='last': choose from 'random', 'first'"),
        ("nft", {"beta": 0.0}, r"beta=0.0: must be above 0"),
        ("awm", {"share": 2.0}, r"share=2.0: must be at most 1"),
        ("dgpo", {"beta": 0.0}, r"beta=0.0: must be above 0"),
        ("dgpo", {"first_steps": 3}, r"first_steps=3: must be at least levels=4"),
        ("dgpo", {"clip_range": -1.0}, r"clip_range=-1.0: must be at least 0"),
        ("vgrpo", {"soft_clip": -1.0}, r"soft_clip=-1.0: must be at least 0"),
        ("vgrpo", {"levels": 0}, r"levels=0: must be at least 1"),
        ("ram", {"scale": 0.0}, r"scale=0.0: must be above 0"),
        ("crd", {"center": "batch"}, r"center='batch': choose from 'update', 'group'"),
        ("crd", {"old_most": 1.0}, r"old_most=1.0: must be in \[0, 1\)"),
        ("dpo", {"beta": -1.0}, r"beta=-1.0: must be above 0"),
        ("dpo", {"reset_every": -1}, r"reset_every=-1: must be at least 0, which means never"),
        ("sft", {"levels": 0}, r"levels=0: must be at least 1"),
        ("rwr", {"temperature": 0.0}, r"temperature=0.0: must be above 0"),
        ("rwr", {"weighting": "max"}, r"weighting='max': choose from 'exp', 'softmax'"),
        ("orw", {"alpha": -0.1}, r"alpha=-0.1: must be at least 0"),
    ],
)
def test_wrong_options_are_named(name, options, problem):
    with pytest.raises(ValueError, match=problem):
        algorithms.load(name, options)


@pytest.mark.parametrize(
    "name, options, problem",
    [
        ("grpo", {"steps": 9}, r"steps=9: the window has 7 steps to train; choose 1 to 7, or 0"),
        ("awm", {"levels": 8}, r"levels=8: sample.steps=8 and share=0.9 leave 6 noise levels"),
        ("ram", {"levels": 8}, r"levels=8: sample.steps=8 and share=0.9 leave 6 noise levels"),
        ("vgrpo", {"levels": 9}, r"levels=9: sample.steps=8 leave 8 noise levels"),
        ("orw", {"levels": 9}, r"levels=9: sample.steps=8 leave 8 noise levels"),
        ("dgpo", {"first_steps": 9}, r"first_steps=9: a rollout has 8 steps \(sample.steps\)"),
    ],
)
def test_more_terms_than_the_rollout_has_are_refused(name, options, problem):
    algorithm = algorithms.load(name, options)
    with pytest.raises(ValueError, match=problem):
        algorithm.terms(setup_of(algorithm), KEY)
