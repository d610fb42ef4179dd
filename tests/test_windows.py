"""Windows: their schedules against upstream's counter, and the compressed tail by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowgrpo_jax import algorithms
from flowgrpo_jax.assembly import settings
from flowgrpo_jax.configs.algorithms import mixgrpo as mixgrpo_recipe
from flowgrpo_jax.sampling import sde, tails, windows
from flowgrpo_jax.sampling.windows import Window

KEY = jax.random.key(0)


def starts(name, window, epochs, key=KEY, **options):
    start = windows.load(name, options, window)
    return np.asarray(jax.vmap(lambda e: start(key, e))(jnp.arange(epochs)))


def test_the_random_window_wanders_over_its_range():
    drawn = starts("random", Window(3, 1, 7), 300)
    values, counts = np.unique(drawn, return_counts=True)
    np.testing.assert_array_equal(values, [1, 2, 3, 4])  # the last window is steps 4, 5, 6
    assert counts.min() > 45  # of 75 expected: 4 sigma
    np.testing.assert_array_equal(drawn, starts("random", Window(3, 1, 7), 300))
    assert (drawn != starts("random", Window(3, 1, 7), 300, jax.random.key(1))).any()
    assert windows.load("random", {}, Window(3, 0, 3))(KEY, 5) == 0


def of_parts(name, window, epochs, count):
    start = windows.load(name, {}, window)
    return np.array([[int(start(KEY, e, p, count)) for p in range(count)] for e in range(epochs)])


def test_each_part_has_a_window_of_its_own():
    window = Window(3, 1, 7)  # four places
    drawn = of_parts("random", window, 40, 4)
    np.testing.assert_array_equal(drawn[:, 0], starts("random", window, 40))  # as the only part's
    values, counts = np.unique(drawn, return_counts=True)
    assert values.tolist() == [1, 2, 3, 4] and counts.min() > 20  # of 40 expected: 4 sigma
    assert any(len(set(row)) < 4 for row in drawn.tolist())
    apart = of_parts("distinct", window, 40, 3)
    assert all(len(set(row)) == 3 for row in apart.tolist()) and {*apart.ravel()} == {1, 2, 3, 4}
    assert of_parts("each", window, 2, 4).tolist() == [[1, 2, 3, 4]] * 2
    assert of_parts("each", window, 4, 3).tolist() == [[1, 2, 3], [4, 1, 2], [3, 4, 1], [2, 3, 4]]
    assert (of_parts("progressive", window, 26, 2) == [[1, 1]] * 25 + [[2, 2]]).all()
    for name in ("distinct", "each"):
        with pytest.raises(ValueError, match=r"sample\.windows=5: .* 4 places .*at most 4"):
            of_parts(name, window, 1, 5)


def test_a_frozen_window_stays():
    np.testing.assert_array_equal(starts("frozen", Window(4, 2, 6), 50), np.full(50, 2))


class Counter:
    """MixGRPO's window as its trainer moves it, an iteration at a time."""

    def __init__(self, size, high, stay, stride=1, roll_back=True):
        self.place = self.done = 0
        self.last, self.stay, self.stride = high - size, stay, stride
        self.roll_back = roll_back

    def advance(self):
        self.done += 1
        if self.done >= self.stay(self.place):
            self.done = 0
            self.place += self.stride
            if self.place > self.last:
                self.place = 0 if self.roll_back else self.last - self.last % self.stride

    def run(self, epochs):
        found = []
        for _ in range(epochs):
            found.append(self.place)
            self.advance()
        return found


@pytest.mark.parametrize(
    "name, options, stay",
    [
        ("progressive", {}, lambda place: 25),
        ("progressive", {"every": 3}, lambda place: 3),
        ("decay", {}, lambda place: max(6, int(25 * (1 - place / 23) + 6 * place / 23))),
        ("decay", {"every": 10, "least": 1}, lambda place: int(10 - 9 * place / 23 + 1e-9)),
        ("exp_decay", {}, lambda place: np.ceil(25 * np.exp(-0.1 * max(place - 13, 0)))),
        (
            "exp_decay",
            {"every": 5, "rate": 1.0, "flat": 2},
            lambda p: np.ceil(5 * np.e ** -max(p - 2, 0)),
        ),
    ],
)
@pytest.mark.parametrize("stride", [1, 4])
@pytest.mark.parametrize("roll_back", [True, False])
def test_a_window_moves_as_mixgrpos_counter(name, options, stay, stride, roll_back):
    """25 steps, a window of 4, upstream's highest step 23."""
    options = options | {"stride": stride, "roll_back": roll_back}
    wanted = Counter(4, 23, stay, stride, roll_back).run(1200)
    np.testing.assert_array_equal(starts(name, Window(4, 0, 23), 1200, **options), wanted)
    assert max(wanted) == (19 if stride == 1 else 16)


def test_stays_by_hand():
    """Epochs at each place, with the published constants."""
    counts = {
        name: np.bincount(starts(name, Window(4, 0, 23), 700, roll_back=False))[:-1]
        for name in ("progressive", "decay", "exp_decay")
    }
    np.testing.assert_array_equal(counts["progressive"], np.full(19, 25))
    np.testing.assert_array_equal(counts["decay"][[0, 1, 10, 18]], [25, 24, 16, 10])
    np.testing.assert_array_equal(counts["exp_decay"][[0, 13, 14, 15, 18]], [25, 25, 23, 21, 16])


def test_a_window_may_begin_later():
    drawn = starts("progressive", Window(2, 3, 7), 8, every=2)
    np.testing.assert_array_equal(drawn, [3, 3, 4, 4, 5, 5, 3, 3])


@pytest.mark.parametrize(
    "name, window, options, problem",
    [
        (
            "sliding",
            Window(2, 0, 5),
            {},
            r"window_schedule 'sliding' is unknown: choose from decay",
        ),
        ("random", Window(2, 0, 5), {"every": 2}, r"window_options of random: every is unknown"),
        ("progressive", Window(2, 0, 2), {}, r"window_range=\(0, 2\) leaves .* 2 steps no room"),
        ("progressive", Window(2, 0, 5), {"every": 0}, r"window_options\.every=0: .*at least 1"),
        ("progressive", Window(2, 0, 5), {"stride": 0}, r"window_options\.stride=0: .*at least 1"),
        (
            "exp_decay",
            Window(4, 0, 18),
            {"stride": 15},
            r"window_options\.stride=15: .* 4 steps .*window_range=\(0, 18\); choose 1 to 14",
        ),
        ("decay", Window(2, 0, 5), {"least": 26}, r"least=26: must be between 1 and every=25"),
        ("exp_decay", Window(2, 0, 5), {"rate": -1.0}, r"window_options\.rate=-1\.0: .*at least 0"),
        ("frozen", Window(2, 1, 5), {}, r"window_range=\(1, 5\) is wider.*set it to \(1, 3\)"),
    ],
)
def test_a_wrong_schedule_is_named(name, window, options, problem):
    with pytest.raises(ValueError, match=problem):
        windows.load(name, options, window)


# ------------------------------------------------------------------------- the compressed tail


def mixgrpo():
    """Its schedule: 25 even steps from 1 to 0, shifted by 3."""
    u = np.linspace(1, 0, 26)
    return tuple((3 * u / (1 + 2 * u)).tolist())


@pytest.mark.parametrize("share, passes", [(0.4, 11), (0.2, 7)])
def test_forward_passes_of_mixgrpo_flash(share, passes):
    """As counted in upstream's code for the first place of its window: 4 steps and a tail of 7 for
    Flash, of 3 for Flash*, one fewer than in the paper."""
    table = tails.compressed(mixgrpo(), 3.0, 4, share)
    assert len(np.trim_zeros(table[0], "b")) == passes


@pytest.mark.parametrize("share", [0.2, 0.4, 0.9])
def test_a_schedule_is_whole_up_to_the_window_and_even_after_it(share):
    sigmas = mixgrpo()
    table = tails.compressed(sigmas, 3.0, 4, share)
    assert len(table) == 21 and len({len(row) for row in table}) == 1
    for start, row in enumerate(table):
        end = start + 4
        assert row[: end + 1] == sigmas[: end + 1]
        tail = np.array([*np.trim_zeros(row, "b")[end:], 0.0])
        time = tail / (3 - 2 * tail)  # before the shift
        assert time[0] == pytest.approx(1 - end / 25)
        np.testing.assert_allclose(np.diff(time), -time[0] / (len(tail) - 1), rtol=1e-6)
        points = int((25 - (end - 1)) * share)
        assert len(tail) == max(points, 2)  # upstream's single point would not reach 0


def test_a_share_of_all_keeps_the_schedule():
    assert tails.compressed(mixgrpo(), 3.0, 4, 1.0) == ()


def test_on_sd3s_schedule_the_tail_has_no_tiny_step():
    table = tails.compressed(tuple(sde.sigma_schedule(10).tolist()), 3.0, 3, 0.6)
    tail = [*np.trim_zeros(table[0], "b")[3:], 0.0]
    u = np.linspace(0.66766, 0, 4)  # from 1 - 3 (1 - 0.002994) / 9, three of nine steps to 0.002994
    np.testing.assert_allclose(tail, 3 * u / (1 + 2 * u), atol=1e-5)


@pytest.mark.parametrize("variant, every, share", [("full", 25, 1.0), ("flash", 20, 0.4)])
def test_the_recipe_of_mixgrpo_has_its_constants(variant, every, share):
    c = mixgrpo_recipe.get_config(variant)
    settings.check(c)
    algorithm = algorithms.load("grpo", c.algorithm.options.to_dict())
    assert settings.window(c, algorithm) == Window(4, 0, c.sample.steps - 3)
    start = settings.make_window(c, algorithm)
    assert [int(start(KEY, e)) for e in (0, every - 1, every, 14 * every)] == [0, 0, 1, 0]
    assert (c.sample.noise_level, c.sample.tail, c.sample.branches) == (0.7, share, 0)
    assert c.sample.solver == ("euler" if variant == "full" else "dpmpp_2m")
    with pytest.raises(ValueError, match="mixgrpo:fast: choose a variant from full, flash"):
        mixgrpo_recipe.get_config("fast")
