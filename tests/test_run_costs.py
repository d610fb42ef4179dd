"""What a run says about its cost and speed, on values that are counted by hand."""

import time
from types import SimpleNamespace

import pytest
from short_runs import load, rows

from flowgrpo_jax.assembly import recipe
from flowgrpo_jax.costs import hardware, run_costs
from flowgrpo_jax.train import train
from flowgrpo_jax.training import lifecycle


@pytest.mark.parametrize(
    "kind, peak",
    [
        ("TPU v5 lite", 197e12),
        ("TPU v5p", 459e12),
        ("TPU v6 lite", 918e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("cpu", None),
    ],
)
def test_the_peak_of_a_device_by_its_name(kind, peak):
    assert hardware.peak(SimpleNamespace(device_kind=kind)) == peak


def test_guidance_doubles_the_work_of_a_pass(runs):
    plain = recipe.build(load(runs, sample__guidance_scale=1.0))
    guided = recipe.build(load(runs, sample__guidance_scale=3.0))
    work = run_costs.forward_flop(plain)
    assert run_costs.forward_flop(guided) == 2 * work > 0
    # Each of a linear's weights takes part in one multiplication and addition for each token, and
    # those of the modulation for each image alone: between one token's work and all tokens'.
    weights = sum(x.size for path, x in plain.model.base.items() if path.endswith("kernel"))
    height, width, _ = plain.model.latent_shape(plain.config.model.height, plain.config.model.width)
    tokens = height * width // 4 + 77 + plain.config.model.options.t5_length
    assert 2 * weights < work < 4 * weights * tokens


def test_the_share_of_the_peak_is_that_of_all_devices(runs, monkeypatch):
    run = recipe.build(load(runs))
    passes = run_costs.forwards(run, 0) * run.plan.images
    monkeypatch.setattr(hardware, "peak", lambda device: 1e6)
    found = run_costs.speed(run, 500.0, 0, seconds=2.0)
    assert found["images_per_second"] == run.plan.images / 2
    assert found["forwards_per_second"] == passes / 2
    assert found["share_of_peak"] == pytest.approx(passes / 2 * 500 / 1e6 / run.mesh.size)
    monkeypatch.setattr(hardware, "peak", lambda device: None)
    assert "share_of_peak" not in run_costs.speed(run, 500.0, 0, seconds=2.0)


def test_the_stages_of_an_epoch_add_up(monkeypatch):
    """Sampling in two parts of 3 and 4 seconds, of which 2 s of waiting hid 6 s of rewards."""
    now = iter([0, 0, 3, 10, 14, 20, 22, 23, 23])
    monkeypatch.setattr(time, "perf_counter", lambda: next(now))
    stages = lifecycle.Stages()
    for stage in ("sample", "sample", "wait"):
        with stages(stage):
            pass
    assert stages.figures() == {"seconds": 23, "seconds/sample": 7, "seconds/wait": 2}
    stages.seconds["rewards"] = 8
    assert stages.figures()["hidden_rewards"] == 0.75


def test_a_trace_of_one_epoch(runs, tmp_path):
    train(load(runs, epochs=2, eval__every=0), tmp_path / "run", profile=1)
    traces = [file for file in (tmp_path / "run" / "profile").rglob("*") if file.is_file()]
    assert traces and len(rows(tmp_path / "run")) == 2
