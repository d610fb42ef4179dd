"""Parts of an epoch, with windows or tails of their own: the plan, the prompts, and whole runs."""

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from linear_policy import KEY, SHAPE, SIGMAS, close, flat, gradient_of, linear, weights
from ml_collections import ConfigDict
from short_runs import load, rows, timeless

from flowgrpo_jax import advantages, algorithms, update
from flowgrpo_jax.algorithms import Setup
from flowgrpo_jax.assembly import batch_plan, parts, rollout_settings
from flowgrpo_jax.assembly.run import Run
from flowgrpo_jax.configs import shapes
from flowgrpo_jax.configs.algorithms import branch_grpo, flash_grpo, g2rpo, tempflow
from flowgrpo_jax.sampling import branching, sampler, sde, tails, windows
from flowgrpo_jax.sampling.branching import Branches
from flowgrpo_jax.sampling.sampler import ODE_KEY, Process
from flowgrpo_jax.train import train

RECORDS = [{"prompt": f"a picture of {n}"} for n in range(40)]


def config_of(**changes):
    c = shapes.get_config()
    c.prompts.tag_weights = ConfigDict()
    c.update_from_flattened_dict({f"sample.{k}": v for k, v in changes.items()})
    return c


# ------------------------------------------------------------------------ plan and prompts


def test_a_micro_batch_lies_within_a_part():
    plan = batch_plan.make_plan(config_of(windows=4, micro_batch=24), devices=1)
    assert [plan.part(m) for m in range(12)] == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    derived = batch_plan.make_plan(config_of(windows=8, micro_batch=0), devices=2)
    assert derived.micro_batch == 36 and derived.part(7) == 7
    assert batch_plan.make_plan(config_of(), devices=2).part(1) == 0


@pytest.mark.parametrize(
    "changes, problem",
    [
        ({"windows": 5}, r"sample\.groups=24 cannot be cut into 5 equal parts"),
        (
            {"windows": 2, "strides": (1, 2, 3), "micro_batch": 144},
            r"parts of 48: choose from .*48",
        ),
        ({"windows": 0}, r"sample\.windows=0: must be at least 1"),
        ({"windows": 24}, r"sample\.micro_batch=144 .*parts of 12: choose from .*12"),
        ({"windows": 24, "window": 3, "window_schedule": "each"}, r"has 5 places in .*\(3, 10\)"),
        ({"strides": (1, 0)}, r"sample\.strides=\(1, 0\): must be one or more numbers of at least"),
        ({"strides": (2,), "tail": 0.5}, r"strides=\(2,\) and sample\.tail=0\.5: both"),
        ({"branches": 5}, r"sample\.branches=5: .*must divide sample\.group_size=12"),
    ],
)
def test_parts_that_do_not_come_out_even(changes, problem):
    with pytest.raises(ValueError, match=problem):
        batch_plan.make_plan(config_of(**changes), devices=1)


@pytest.mark.parametrize("change", [{"windows": 2}, {"strides": (1, 2)}, {"branches": 0}])
def test_an_algorithm_without_a_window_has_no_parts(change):
    c = config_of(**change)
    c.algorithm = ConfigDict({"name": "nft", "options": {}})
    with pytest.raises(ValueError, match=r"nft draws without a window; set"):
        batch_plan.make_plan(c, devices=1)


def test_parts_repeat_their_prompts_or_have_their_own():
    def ids(**changes):
        batch = parts.draw_prompts(config_of(groups=12, **changes), RECORDS, 3)
        assert batch.prompts == [RECORDS[i]["prompt"] for i in batch.ids]
        assert [record["prompt"] for record in batch.metadata] == batch.prompts
        return batch.ids.reshape(changes.get("windows", 1), len(changes.get("strides", (1,))), -1)

    assert len(np.unique(ids(windows=3))) == 12
    same = ids(windows=3, same_prompts=True)
    assert len(np.unique(same)) == 4 and (same == same[:1]).all()
    tailed = ids(windows=2, strides=(1, 2, 3))
    assert len(np.unique(tailed)) == 4 and (tailed == tailed[:, :1]).all()
    np.testing.assert_array_equal(
        ids(), parts.draw_prompts(config_of(groups=12), RECORDS, 3).ids[None, None]
    )


# ------------------------------------------------------------------------------- the tails


def test_a_strided_tail_by_hand():
    sigmas = tuple(float(s) for s in range(6, -1, -1))
    table = tails.strided(sigmas, 2, (1, 2, 3))
    starts = len(table) // 3
    assert starts == 4 and len({len(row) for row in table}) == 1
    assert table[:starts] == (sigmas,) * 4
    # The window (6, 5, 4), then every second and every third of 4, 3, 2, 1, 0.
    assert table[starts] == (6, 5, 4, 2, 0, 0, 0)
    assert table[starts + 1] == (6, 5, 4, 3, 1, 0, 0)
    assert table[2 * starts] == (6, 5, 4, 1, 0, 0, 0)
    assert tails.strided(sigmas, 2, (1, 1)) == ()


STRIDES = (1, 2, 3)
STRIDED = Process(
    SIGMAS, sde.CPS, 0.8, window=1, branches=Branches(8),
    by_start=tails.strided(SIGMAS, 1, STRIDES), tails=3,
)  # fmt: skip


@jax.jit
def draw(params, tail):
    places = jnp.arange(8)
    keys_of = partial(sampler.image_keys, KEY, 0, jnp.zeros_like(places))
    nodes = branching.nodes(STRIDED.branches, keys_of, places, 1)
    x = sampler.normal(nodes.keys[0], ODE_KEY, SHAPE)
    v = partial(linear, params)
    return sampler.rollout(v, STRIDED, x, keys_of(places), 2, places, tail, nodes)


def test_tails_differ_after_the_same_transitions():
    """Bit for bit the same, and the ODE on every stride-th sigma from there on."""
    params = weights(0)
    drawn = [draw(params, tail) for tail in range(3)]
    for tail, stride in enumerate(STRIDES):
        np.testing.assert_array_equal(drawn[tail].x, drawn[0].x)
        np.testing.assert_array_equal(drawn[tail].log_prob, drawn[0].log_prob)
        sigmas = (*SIGMAS[3:8:stride], 0.0)
        end = sampler.ode(partial(linear, params), sigmas, drawn[0].x[1])
        np.testing.assert_allclose(drawn[tail].latents, end, atol=1e-5)
    assert np.abs(drawn[0].latents - drawn[1].latents).max() > 1e-3


def test_g2rpo_trains_the_sum_of_the_advantages():
    """On policy; off policy too, as long as nothing is clipped."""
    params, others = weights(0), np.random.default_rng(2).normal(size=(3, 8))
    rollout, setup = draw(params, 0), Setup(STRIDED, 8)
    each = [jnp.asarray(a, jnp.float32) for a in others]
    for clip_range, policy in ((0.2, params), (np.inf, weights(1))):
        grpo = algorithms.load("grpo", {"clip_range": clip_range})
        gradients = [gradient_of(grpo, setup, policy, {}, rollout, a)[0] for a in each]
        total, figures = gradient_of(grpo, setup, policy, {}, rollout, sum(each))
        close(jax.tree.map(lambda *g: sum(g), *gradients), total, rtol=1e-3, atol=1e-5)
        assert (figures["ratio_gap"] < 1e-5) == (policy is params)
        assert np.abs(flat(total)).max() > 1e-3


@pytest.mark.parametrize("strides", [(1,), STRIDES], ids=["tempflow", "g2rpo"])
def test_one_noisy_step_after_a_shared_path_finds_a_known_optimum(strides):
    """The policy is one vector, the reward -|end - target|^2: the mean end must become target.

    The images of a group start from one noise and differ by one step, whose place changes with the
    epoch; each tail has pictures and advantages of its own.
    """
    target, sigmas, groups, size = jnp.array([1.0, -0.6]), (1.0, 0.8, 0.6, 0.4, 0.2, 0.0), 16, 8
    ways = {"by_start": tails.strided(sigmas, 1, strides), "tails": len(strides)}
    process = Process(sigmas, sde.CPS, 0.5, window=1, branches=Branches(size), **ways)
    grpo, tx = algorithms.load("grpo", {"clip_range": 0.2}), update.optimiser(0.03)
    group, image = jnp.divmod(jnp.arange(groups * size), size)

    def velocity(params, x, sigma, rows=None):
        return jnp.broadcast_to(params["v"], x.shape)

    def epoch(state, number):
        keys_of = partial(sampler.image_keys, KEY, number, group)
        nodes = branching.nodes(process.branches, keys_of, image, 1)
        x, keys = sampler.normal(nodes.keys[0], ODE_KEY, (1, 1, 2)), keys_of(image)
        gradients = []
        for tail in range(len(strides)):
            given = process, x, keys, number % 4, group, tail, nodes
            rollout = sampler.rollout(partial(velocity, state.policy), *given)
            reward = -jnp.square(rollout.latents - target).sum((1, 2, 3))
            advantage = advantages.normalised(reward, jnp.ones(len(group), bool), group_size=size)
            on = Setup(process, size), state.policy, {}, rollout, advantage, velocity
            gradients.append(gradient_of(grpo, *on)[0])
        summed = jax.tree.map(lambda *g: sum(g), *gradients)
        return update.apply_gradient(state, summed, tx, 0.9)[0], rollout.latents.mean((0, 1, 2))

    state = update.init({"v": jnp.zeros(2)}, grpo.copies, {}, tx, KEY)
    _, ends = jax.jit(lambda s: jax.lax.scan(epoch, s, jnp.arange(150)))(state)
    assert np.abs(ends[:10].mean(0) - target).min() > 0.4
    np.testing.assert_allclose(ends[-50:].mean(0), target, atol=0.1)


# -------------------------------------------------------------------------------- the runs


def test_each_part_has_its_window_and_tail():
    """Windows one after the other, each with all tails before the next one."""
    run = SimpleNamespace(
        plan=batch_plan.Plan(12, 4, 1, 4, parts=6),
        setup=Setup(STRIDED, 4),
        window_start=windows.load("each", {}, windows.Window(1, 2, 5)),
    )
    places = Run.places(run, KEY, 1)
    assert [(int(start), tail) for start, tail in places] == [
        (start, tail) for start in (4, 2) for tail in range(3)
    ]


def test_a_run_goes_on_bit_for_bit(runs, tmp_path):
    """One prompt, trees of two leaves, two tails after each, and log-probs and epochs that the
    advantages read."""

    def config(epochs):
        c = load(runs, epochs=epochs, eval__every=0, log__tensorboard=False)
        c.algorithm.options.clip_range = 1e-3
        c.sample.kernel, c.sample.micro_batch = "precise", 4
        c.sample.window, c.sample.window_range = 3, (0, 0)
        c.sample.groups, c.sample.strides = 2, (1, 2)
        c.sample.branches, c.sample.splits, c.sample.split_noise = 2, (1,), 2.0
        options = {"fusion": "softmax", "prune": 1, "prune_every": 1}
        c.advantage = ConfigDict({"name": "tree", "clip": 5.0, "options": options})
        return c

    whole = train(config(2), tmp_path / "whole")
    train(config(1), tmp_path / "halves")
    resumed = train(config(2), tmp_path / "halves", resume=True)
    drawn, again = (rows(tmp_path / name) for name in ("whole", "halves"))
    for a, b in zip(drawn, again, strict=True):
        assert timeless(a) == timeless(b)
        assert a["ratio_gap"] < 1e-5 and a["broken"] == a["failed"] == a["skipped"] == 0
    assert drawn[0]["grad_norm"] > 0
    jax.tree.map(np.testing.assert_array_equal, *(s.replace(key=0) for s in (whole, resumed)))
    assert int(whole.memory["epochs"]) == 2


# ----------------------------------------------------------------------------- the recipes


@pytest.mark.parametrize(
    "module, parts_of, branches",
    [
        (tempflow, {"full": 10, "capped": 3}, Branches(6)),
        (flash_grpo, {None: 18}, Branches(1)),
        (g2rpo, {None: 3}, Branches(12)),
        (branch_grpo, {"full": 1, "pruned": 1}, Branches(16, (0, 3, 6, 9), 4.0)),
    ],
)
def test_the_recipes_have_the_papers_shape(module, parts_of, branches):
    for variant, count in parts_of.items():
        c = module.get_config(variant) if variant else module.get_config()
        assert batch_plan.make_plan(c, devices=2).parts == count
        assert rollout_settings.branches(c) == branches
    if len(parts_of) > 1:
        with pytest.raises(ValueError, match="choose a variant from full, "):
            module.get_config("fast")
