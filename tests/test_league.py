"""The league's figures on pictures whose values are known, and its table."""

import numpy as np
import pytest

from benchmarks import claims, league, standings
from flowgrpo_jax import algorithms


def flat(*levels):
    """Pictures of one grey level each."""
    return np.stack([np.full((4, 4, 3), level, np.uint8) for level in levels])


def test_the_difference_is_within_prompts_alone():
    pictures, ids = flat(0, 10, 200, 230), np.array([5, 5, 8, 8])
    assert league.difference(pictures, ids) == 20.0
    assert league.difference(pictures, np.array([1, 1, 1, 2])) == pytest.approx(
        (10 + 200 + 190) / 3
    )
    assert np.isnan(league.difference(pictures, np.arange(4)))


def test_the_entropy_of_colours_is_that_of_their_shares():
    assert league.colour_entropy(flat(0, 255)) == pytest.approx(0, abs=1e-6)
    half = flat(0)
    half[:, :2] = 255
    assert league.colour_entropy(half) == pytest.approx(1.0)
    half[:, :2, :2] = (255, 0, 0)  # a half, a quarter, a quarter
    assert league.colour_entropy(half) == pytest.approx(1.5)


def test_every_algorithm_has_a_row_and_images_of_its_own_number():
    assert set(algorithms.TABLE) <= set(league.rows())
    config = league.settings("nft", seed=3, images=1000, evaluated=96)
    assert (config.algorithm.name, config.seed, config.epochs) == ("nft", 3, 4)  # of 288 images
    assert (config.eval.every, config.eval.images) == (1, 24)


def test_forward_passes_are_counted_by_hand():
    """GRPO: 20 steps, 3 of them trained. NFT: 10 steps, 9 levels with its old and base policies."""
    counted = [league.forwards(league.settings(row, 0, 288, 48)) for row in ("grpo", "nft")]
    assert counted == [20 + 3 * 3, 10 + 9 * (3 + 2)]


def test_the_base_is_measured_without_training(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(league, "measure", lambda *asked_for: asked.append(asked_for[1:]) or {})
    monkeypatch.setattr(league, "train", None)
    found = league.run("base", 1, 14400, 96, tmp_path / "base", {})
    assert asked == [(96, "base")] and not list(tmp_path.iterdir())
    assert (found["row"], found["images"], found["forwards"]) == ("base", 0, 0)


def result(row, seed, strict):
    return {
        "row": row,
        "seed": seed,
        "images": 288,
        "curve": [(0, 0.5), (288, strict)],
        "held_out": {"shapes_strict": strict, "shapes": 0.8, "shapes_unknown": 0.1},
        "per_tag": {"position": 0.5, "counting": strict},
        "trained_prompts": {"shapes_strict": 0.7},
        **dict.fromkeys(("difference", "colour_entropy", "true_loss", "minutes", "forwards"), 1.0),
    }


def test_the_table_ranks_means_and_says_their_spread(tmp_path):
    results = [result("a", 0, 0.6), result("b", 0, 0.7), result("b", 1, 0.8)]
    lines = standings.table(results).splitlines()
    assert lines[2].startswith("| b | 2 | 288 | 0.750 ± 0.071 | 0.700 | 0.800 | 0.100 |")
    assert lines[3].startswith("| a | 1 | 288 | 0.600 | 0.700 | 0.800 | 0.100 |")
    lines = standings.by_tag(results).splitlines()
    assert lines[0] == "| row | images | counting | position |"
    assert lines[2] == "| b | 288 | 0.75 | 0.50 |"
    pytest.importorskip("matplotlib")
    standings.draw(results, 288, tmp_path / "images" / "league.png")
    assert (tmp_path / "images" / "league.png").stat().st_size > 5000


def test_the_variants_change_what_they_say():
    changed = {v: league.settings(claims.row(v), 0, 1000, 96) for v in claims.VARIANTS}
    for variant, config in changed.items():
        sample = config.sample
        assert sample.groups * sample.group_size == 288, variant
        low, high = sample.window_range
        assert low >= 0 and high - low >= sample.window and high <= sample.steps - 1
    assert changed["steps-10"].sample.steps == 10
    assert changed["group-24"].sample.group_size == 24
    assert changed["strict"].reward.weights.to_dict() == {"shapes_strict": 1.0}
    assert changed["held"].algorithm.options.kl_beta == 1.0
    assert {c.better for c in claims.CLAIMS} | {c.other for c in claims.CLAIMS} == {
        *claims.VARIANTS,
        "",
    }


def test_verdicts_know_what_counting_leaves():
    """1,152 pictures with half of them right: a standard error of .0147, and .0208 of two."""

    def runs(**values):
        return [
            result(claims.row(v.replace("_", "-")), seed, x) | {"evaluated": 1152}
            for v, xs in values.items()
            for seed, x in enumerate(xs)
        ]

    def verdict(text, results):
        line = next(line for line in claims.table(results).splitlines() if text in line)
        return [cell.strip() for cell in line.split("|")][2:-1]

    some = runs(noise_7=[0.5], noise_3=[0.47], steps_10=[0.6], steps_5=[0.4])
    assert verdict("0.3 (Flow", some) == [
        "0.500 against 0.470",
        "+0.030 ± 0.021",
        "within the noise",
    ]
    assert verdict("5 steps", some)[-1] == "yes"
    assert verdict("5 steps", runs(steps_10=[0.4], steps_5=[0.6]))[-1] == "no, the opposite"
    assert verdict("batch", some)[-1] == "not run"
    spread = runs(steps_10=[0.3, 0.7], steps_5=[0.2, 0.4])  # two seeds that differ by much
    assert verdict("5 steps", spread)[-1] == "within the noise"
    # Another row's seeds differ by 0.09: so does, on average, one run from another one
    others = [result("nft", seed, x) | {"evaluated": 1152} for seed, x in enumerate((0.5, 0.59))]
    assert verdict("5 steps", [*some, *others])[1:] == ["+0.200 ± 0.090", "yes"]
    assert verdict("0.3 (Flow", [*some, *others])[1] == "+0.030 ± 0.090"
    same = [*runs(**{"steps_10": [0.5]}), result("grpo", 0, 0.52) | {"evaluated": 1152}]
    assert verdict("as good as 20", same)[-1] == "yes, within the noise"
