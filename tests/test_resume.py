"""Runs go on where they ended, and never with what belongs to another run."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from short_runs import load, rows, same, timeless

from flowgrpo_jax import update
from flowgrpo_jax.assembly.run import build_run
from flowgrpo_jax.checkpoints import policies
from flowgrpo_jax.checkpoints.checkpoint import Checkpoints
from flowgrpo_jax.checkpoints.run_record import changed_settings
from flowgrpo_jax.train import train


def test_it_does_not_write_over_a_run(runs, half):
    before = rows(half)
    with pytest.raises(FileExistsError, match=r"half already holds a run: add --resume"):
        train(load(runs), half)
    assert rows(half) == before


def test_two_epochs_and_two_more_are_four(runs, half, whole):
    shutil.copytree(half, runs / "resumed")
    state = train(load(runs), runs / "resumed", resume=True)
    same(state, whole.state)
    assert [*map(timeless, rows(runs / "resumed"))] == [*map(timeless, rows(whole.workdir))]


def test_with_nothing_to_resume_it_starts(runs, half, caplog):
    """Launchers always say --resume; the first time there is nothing yet."""
    config = load(runs, epochs=1, eval__every=0)
    assert int(train(config, runs / "nothing", resume=True).step) == 2
    assert "nothing/checkpoints: starting from epoch 0" in caplog.text
    (ours,), theirs = rows(runs / "nothing"), rows(half)[0]
    assert timeless(ours) == timeless(theirs, prefix="eval/")


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"lora__rank": 3}, r"lora\.rank=2"),
        ({"kl__name": "adaptive", "algorithm__options__kl_beta": 0.04}, r"kl\.name=''"),
    ],
)
def test_a_resume_that_fails_leaves_the_record_alone(runs, half, tmp_path, changes, said):
    workdir = tmp_path / "other"
    shutil.copytree(half, workdir)
    before = (workdir / "config.json").read_text()
    with pytest.raises(ValueError, match=rf"none of the checkpoints .*trained with .*{said}"):
        train(load(runs, **changes), workdir, resume=True)
    assert (workdir / "config.json").read_text() == before


def small_state(copies=(), memory=(), rank=2):
    """A state whose memory holds arrays of these shapes, by their names."""
    memory = {name: jnp.zeros(shape) for name, shape in dict(memory).items()}
    policy, copies = {"a": jnp.ones((rank, 3))}, dict.fromkeys(copies)
    return update.init(policy, copies, memory, optax.adam(0.1), jax.random.key(0))


CONFIG = {
    "lora": {"rank": 2, "targets": []},
    "algorithm": {"options": {"clip_range": 0.1}},
    "advantage": {"options": {"buffer_size": 8}},
    "kl": {"name": "beta"},
}


@pytest.mark.parametrize(
    "then, now, said",
    [
        ({}, {"copies": ["old"]}, r"copies .*algorithm\.options={'clip_range': 0\.1}"),
        ({"copies": ["old"]}, {}, r"copies .*kl\.name='beta'"),
        ({"memory": {"m": 8}}, {"memory": {"m": 9}}, r"advantage\.options={'buffer_size': 8}"),
        ({}, {"memory": {"kl": 2}}, r"memory .*kl\.name='beta'"),
        ({"copies": ["old"]}, {"copies": ["old"], "rank": 3}, r"ema .*lora\.rank=2"),
    ],
)
def test_a_state_of_other_shapes_names_the_settings_that_they_follow(tmp_path, then, now, said):
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(1, small_state(**then), {"epoch": 1, "config": CONFIG})
    checkpoints.wait()
    with pytest.raises(ValueError, match=rf"{said}.*set what differs to these values") as caught:
        checkpoints.resume(small_state(**now))
    assert "damaged" not in str(caught.value)
    checkpoints.close()


def damage(step, how):
    for file in step.rglob("*"):
        if file.is_file():
            content = file.read_bytes()
            file.write_bytes({"garbage": b"\xff" * len(content), "cut": content[:-9]}[how])


def test_a_resume_says_which_libraries_changed(runs, half, tmp_path, monkeypatch, caplog):
    shutil.copytree(half, tmp_path / "run")
    saved = Checkpoints(half / "checkpoints").record(2)["versions"]
    assert saved["jax"] == jax.__version__ and saved["numpy"] == np.__version__
    now = saved | {"jax": "0.0.1"}
    monkeypatch.setattr("flowgrpo_jax.checkpoints.run_checkpoints.versions", lambda: now)
    train(load(runs, epochs=2, eval__every=0), tmp_path / "run", resume=True)
    assert f"other libraries or devices (jax {jax.__version__} -> 0.0.1)" in caplog.text


def test_a_resume_says_which_settings_changed(runs, half):
    """The dtype of the base, for one, leaves no trace in the shapes of a state."""
    record = Checkpoints(half / "checkpoints").record(2)
    settings = record["config"]
    given = {"epochs": settings["epochs"], "model__path": settings["model"]["path"]}
    assert changed_settings(record, load(runs, **given).to_dict() | {"added_since": 1}) == []
    other = load(runs, **given, model__base_dtype="int8").to_dict()
    assert changed_settings(record, other) == ["model.base_dtype:  -> int8"]


@pytest.mark.parametrize("how", ["garbage", "cut"])
def test_a_damaged_checkpoint_is_passed_over(runs, whole, how, caplog):
    workdir = runs / how
    shutil.copytree(whole.workdir, workdir)
    damage(workdir / "checkpoints" / "4", how)
    state = train(load(runs), workdir, resume=True)
    assert f"{workdir}/checkpoints/4 cannot be read" in caplog.text
    same(state, whole.state)
    _, record = Checkpoints(workdir / "checkpoints").resume(state)
    assert record["epoch"] == 4  # it was written again

    for step in (workdir / "checkpoints").iterdir():
        damage(step, how)
    with pytest.raises(ValueError, match=r"none of the checkpoints \[1, 2, 3, 4\].*damaged"):
        train(load(runs), workdir, resume=True)


def test_the_best_is_of_this_run(runs, whole, tmp_path):
    """A work directory with a best checkpoint alone is another run's all the same."""
    best = tmp_path / "run" / "best"
    shutil.copytree(whole.workdir / "checkpoints" / "4", best / "4")
    with pytest.raises(FileExistsError, match="already holds a run"):
        train(load(runs), tmp_path / "run")


@pytest.mark.parametrize("source", ["", "best"])
def test_weights_are_not_scaled_otherwise_than_they_were_trained(runs, whole, source):
    """Alpha is not in the weights: at another one they would load, and act too much or little."""
    alpha = load(runs).lora.alpha
    run = build_run(load(runs, lora__alpha=2 * alpha), training=False)
    wrong = rf"trained with lora\.alpha={alpha}, and the config has lora\.alpha={2 * alpha}: set"
    with pytest.raises(ValueError, match=wrong):
        policies.load(whole.workdir / source, run.model)


@pytest.mark.parametrize("change", [{"seed": 5}, {"lora__alpha": 1.5}])
def test_a_run_does_not_go_on_with_another(runs, whole, change):
    before = (whole.workdir / "config.json").read_text()
    with pytest.raises(ValueError, match=r"was trained with .*set --config"):
        train(load(runs, epochs=5, **change), whole.workdir, resume=True)
    assert (whole.workdir / "config.json").read_text() == before
