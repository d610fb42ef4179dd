"""The control of the KL: its rows against hand computation and scipy, and runs that use them."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from linear_policy import draw, finished, flat, linear, setup_of, weights
from ml_collections import ConfigDict
from scipy.stats import rankdata
from short_runs import load, rows, same, timeless

from flowgrpo_jax import algorithms
from flowgrpo_jax.assembly import settings
from flowgrpo_jax.regularisation import kl_control
from flowgrpo_jax.train import train
from flowgrpo_jax.types import Credit

NAMES = ("main", "better", "worse")
TRAINED = np.array([1.0, 0.0, 0.0], np.float32)


def control(name, options=None, **resets):
    return kl_control.load(name, options or {}, NAMES, **resets)


def weigh(made, scores, memory=None, weights=TRAINED):
    scores = np.asarray(scores, np.float32)
    table = np.broadcast_to(np.reshape(weights, (-1, 1)), scores.shape)
    return made.weigh(memory or made.initial(), scores, table)


# ------------------------------------------------------------------------------ adaptive


def test_the_factor_follows_the_kl_in_proportion_within_limits():
    made = control("adaptive", {"target": 0.5, "rate": 0.1, "limit": 0.2})
    memory = made.initial()
    for kl, wanted in [(0.55, 1.01), (5.0, 1.01 * 1.02), (0.0, 1.01 * 1.02 * 0.98)]:
        memory = made.settle(memory, kl)
        np.testing.assert_allclose(memory["factor"], wanted, rtol=1e-6)
    assert made.settle(memory, float("nan")) == memory  # nothing was measured
    np.testing.assert_allclose(weigh(made, np.ones((3, 4)), memory)[0], np.full(4, wanted))
    assert made.figures(memory) == {"kl_factor": pytest.approx(wanted)}


# ------------------------------------------------------------------------------- GARDO


def test_ranks_are_scipys():
    x = np.array([0.3, 1.0, np.nan, 0.3, -2.0, 1.0, 1.0], np.float32)
    kept = ~np.isnan(x)
    np.testing.assert_allclose(kl_control.ranks(x)[kept], rankdata(x[kept]) / 6)
    assert np.isnan(kl_control.ranks(x)[2])


def test_an_image_that_only_the_trained_reward_likes_is_uncertain():
    """Ranks of five images: main 1 2 3 4 5; the others, one of which is better when lower, give
    the last image their lowest mean rank."""
    scores = [[1, 2, 3, 4, 5], [0.2, 0.3, 0.4, 0.5, 0.1], [9, 7, 6, 5, 10]]
    signs = np.array([0.0, 1.0, -1.0])
    u = kl_control.uncertainty(np.array(scores), np.tile(TRAINED[:, None], (1, 5)), signs)
    others = [(2 + 2) / 2, (3 + 3) / 2, (4 + 4) / 2, (5 + 5) / 2, (1 + 1) / 2]
    np.testing.assert_allclose(u, (np.arange(1, 6) - others) / 5)
    made = control("uncertain", {"auxiliaries": {"better": 1.0, "worse": -1.0}})
    np.testing.assert_array_equal(weigh(made, scores)[0], [0, 0, 0, 0, 5])


def test_the_top_share_of_the_suspicious_ones_is_held():
    """u is -3, ..., 4 sixteenths; half of the five that are not negative, rounded up, are three.
    The KL is a mean over them."""
    main = np.arange(8.0)
    aux = np.array([3.0, 3.0, 3.0, 3.0, 3.0, 3.0, 3.0, 3.0])
    made = control("uncertain", {"auxiliaries": {"better": 1.0}, "share": 0.5, "most": 0.5})
    kl, _ = weigh(made, [main, aux, aux])
    # main ranks 1..8 less the mean rank 4.5: half of the four at or above 0
    np.testing.assert_allclose(kl, [0, 0, 0, 0, 0, 0, 4, 4])
    assert kl.mean() == 1


@pytest.mark.parametrize("agreeing", [True, False])
def test_a_share_of_one_is_the_plain_kl_where_nothing_is_suspicious(agreeing):
    """Auxiliaries of the same order, or none: u is 0 for all."""
    options = {"share": 1.0, "most": 1.0}
    main = np.array([0.2, 0.9, 0.4])
    weights = TRAINED if agreeing else np.array([1.0, np.nan, np.nan])
    kl, _ = weigh(control("uncertain", options), [main, 2 * main, main + 1], weights=weights)
    np.testing.assert_array_equal(kl, np.ones(3))


def test_images_without_scores_are_not_held():
    scores = np.array([[1, np.nan, 3], [1, 2, np.nan], [1, 2, np.nan]])
    kl, _ = weigh(control("uncertain", {"share": 1.0, "most": 1.0}), scores)
    np.testing.assert_array_equal(kl, [3, 0, 0])
    kl, memory = weigh(control("uncertain"), np.full((3, 3), np.nan))
    assert not kl.any() and np.isnan(memory["history"]).all()


def test_the_share_moves_when_the_mean_leaves_the_last_twenty():
    made = control("uncertain", {"share": 0.1, "auxiliaries": {"better": 1.0}})
    memory = made.initial()

    def epoch(spread):
        """The mean u of those at or above 0 grows with the disagreement of two rewards."""
        main = np.arange(10.0)
        aux = main.copy()
        aux[:spread] = aux[:spread][::-1]
        return weigh(made, [main, aux, aux], memory)[1]

    shares = []
    for spread in (4, 6, 5, 2, 10):  # first, above, within, below, above
        memory = epoch(spread)
        shares.append(float(memory["share"]))
    np.testing.assert_allclose(shares, [0.1, 0.11, 0.11, 0.099, 0.1089], rtol=1e-5)
    for _ in range(20):
        memory = epoch(5)
    kept = float(memory["share"])
    assert np.isfinite(memory["history"]).all() and len(memory["history"]) == 20
    memory = epoch(6)  # seen before, but not within the last twenty
    np.testing.assert_allclose(memory["share"], 1.1 * kept, rtol=1e-5)


def test_the_share_stays_within_its_bounds():
    made = control("uncertain", {"share": 0.2, "auxiliaries": {"better": 1.0}})
    main = np.arange(10.0)
    memory = weigh(made, [main, main, main])[1]
    assert weigh(made, [main, -main, main], memory)[1]["share"] == np.float32(0.2)


# --------------------------------------------------------------------- the policy and its KL


def test_the_reference_is_reset_above_a_kl_and_after_some_epochs():
    made = control("constant", reset_above=0.5, reset_every=3)
    memory, reset = made.initial(), []
    for kl in (0.1, 0.6, 0.1, 0.1, 0.1, float("nan")):
        memory = made.settle(memory, kl)
        reset.append(kl_control.must_reset(memory))
    assert reset == [False, True, False, False, True, False]
    assert not kl_control.must_reset(control("constant").initial())


HELD = {  # rows and a weight of their KL
    "grpo": {"clip_range": 0.2, "kl_beta": 0.3},
    "nft": {"anchor": 0.3},
    "awm": {"levels": 3, "kl_beta": 0.3},
    "dgpo": {"kl_beta": 0.3},
    "vgrpo": {"kl_beta": 0.3},
    "ram": {},
    "crd": {"levels": 8, "kl_beta": 0.3},
    "sft": {"kl_beta": 0.3},
    "rwr": {"kl_beta": 0.3},
    "orw": {"alpha": 0.3},
}


def test_every_row_with_a_kl_is_here():
    made = {name: algorithms.load(name, HELD.get(name, {})) for name in algorithms.TABLE}
    assert {name for name, algorithm in made.items() if algorithm.weighs_kl} == set(HELD)


@pytest.mark.parametrize("name", HELD)
def test_the_kl_of_an_image_counts_by_its_weight(name):
    """The gradient is linear in the weights: that of 1 is the plain one, and the gradients of
    weights w and 1 - w make that of 1 and of 0."""
    algorithm = algorithms.load(name, HELD[name])
    setup, rollout = setup_of(algorithm), drawn(algorithm.records == "window")
    views = {key: partial(linear, weights(1)) for key in algorithm.reads}
    advantage, w = jnp.asarray([-2.0, 1.0, 0.25, 0.75]), jnp.linspace(0.1, 0.9, 4)

    def of(given):
        def total(params):
            v = {**views, "policy": partial(linear, params)}
            return algorithm.loss(setup, v, rollout, jnp.int32(2), given)[0].sum()

        return flat(jax.grad(total)(weights(2)))

    plain = of(Credit(advantage))
    all_held, one, other, none = (of(Credit(advantage, k)) for k in (w * 0 + 1, w, 1 - w, w * 0))
    np.testing.assert_allclose(all_held, plain, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(one + other, plain + none, rtol=1e-3, atol=1e-5)
    assert np.abs(one - none).max() > 1e-5


def drawn(window):
    """Four images that were drawn by another policy."""
    if not window:
        return finished()
    setup = setup_of(algorithms.load("grpo", {}))
    return draw(partial(linear, weights(0)), setup.process, count=4)


# ----------------------------------------------------------------------------------- runs


def gardo(runs, **changes):
    c = load(runs, eval__every=0, train__updates_per_epoch=1, **changes)
    c.sample.micro_batch = 8
    c.algorithm.options.kl_beta = 0.04
    c.advantage.name, c.advantage.diversity = "none", "pixels"
    c.reward.weights = ConfigDict({"jpeg_incompressibility": 20.0, "shapes": 0.0})
    c.kl.name, c.kl.reset_every = "uncertain", 2
    return c


def test_a_run_of_gardo_goes_on_bit_for_bit(runs, tmp_path):
    whole = train(gardo(runs, epochs=2), tmp_path / "whole")
    train(gardo(runs, epochs=1), tmp_path / "halves")
    resumed = train(gardo(runs, epochs=2), tmp_path / "halves", resume=True)
    same(whole, resumed)
    found = rows(tmp_path / "whole")
    assert [*map(timeless, found)] == [*map(timeless, rows(tmp_path / "halves"))]
    # The first epoch's policy is its reference. After the second epoch it becomes so again.
    assert [row["kl"] > 1e-9 for row in found] == [False, True]  # but for rounding
    assert [row["reference_age"] for row in found] == [1, 0]
    assert all(0.02 <= row["uncertain_share"] <= 0.2 for row in found)
    assert np.isfinite(whole.memory["kl"]["history"]).sum() == 2
    same(whole.copies["reference"], whole.policy)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"kl.reset_every": 3}, r"kl\.reset_every need a row: set kl\.name"),
        ({"kl.name": "adaptive"}, r"no KL to control; give its option kl_beta"),
        ({"kl.name": "beta"}, r"kl 'beta' is unknown: choose from"),
        ({"advantage.transform": "log"}, r"advantage\.transform='log': choose from 'none', 'exp'"),
    ],
)
def test_settings_that_would_not_be_followed(runs, changes, message):
    config = load(runs)
    config.update_from_flattened_dict(changes)
    if changes.get("kl.name") == "beta":
        config.algorithm.options.kl_beta = 0.1
    with pytest.raises(ValueError, match=message):
        settings.check(config)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"advantage.name": "tree"}, r"advantage\.name='tree': .*advantage\.transform to 'none'"),
        ({"advantage.name": "best_of_n"}, r"advantage\.name='best_of_n': .*change advantage\.name"),
        ({"advantage.diversity": "pixels"}, r"advantage\.diversity='pixels': .*none is left"),
        ({"algorithm.name": "sft"}, r"algorithm\.name='sft': .*change algorithm\.name"),
        ({"algorithm.name": "dpo"}, r"algorithm\.name='dpo': .*set advantage\.transform"),
    ],
)
def test_what_reads_the_zeros_or_signs_of_advantages_takes_no_exponential(runs, changes, message):
    """The exponential makes -1 of 0 and leaves no positive advantage."""
    config = load(runs)
    config.algorithm.options = ConfigDict()
    config.update_from_flattened_dict(changes)
    if changes.get("advantage.name") == "best_of_n":
        config.advantage.options = ConfigDict({"keep": 2})
    settings.check(config)
    config.advantage.transform = "exp"
    with pytest.raises(ValueError, match=rf"advantage\.transform='exp' with {message}"):
        settings.check(config)


@pytest.mark.parametrize(
    "weights, auxiliaries, trained",
    [
        ({"shapes": 1.0}, None, "all of them"),
        ({"shapes": 1.0, "jpeg_compressibility": 0.0}, {"shapes": 1.0}, "shapes"),
    ],
)
def test_what_is_trained_on_cannot_be_watched(runs, weights, auxiliaries, trained):
    """Every image would be as uncertain as the others, and the KL that of all."""
    config = gardo(runs)
    config.reward.weights = ConfigDict(weights)
    config.kl.options = ConfigDict({"auxiliaries": auxiliaries} if auxiliaries else {})
    with pytest.raises(ValueError, match=rf"watches rewards of weight 0.* trains on {trained}:"):
        settings.check(config)


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("adaptive", {"target": 0.0}, r"kl\.options\.target=0\.0: must be above 0"),
        ("uncertain", {"share": 0.3}, r"share=0\.3 must lie within least=0\.02 and most=0\.2"),
        ("uncertain", {"rate": 1.0}, r"kl\.options\.rate=1\.0: must be in \[0, 1\)"),
        ("uncertain", {"auxiliaries": {"x": 1.0}}, r"auxiliaries names \['x'\]: give them"),
        ("uncertain", {"auxiliaries": {"better": 0.5}}, r"auxiliaries=.*0\.5.*: must be 1"),
        ("adaptive", {"speed": 1.0}, r"speed is unknown; .* takes target=0\.001"),
    ],
)
def test_options_that_are_wrong(name, options, message):
    with pytest.raises(ValueError, match=message):
        control(name, options)
