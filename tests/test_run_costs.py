"""What a run says about its cost and speed, on values that are counted by hand."""

import time
from types import SimpleNamespace

import pytest
from short_runs import load, rows

from flowgrpo_jax.assembly.run import build_run
from flowgrpo_jax.costs import hardware, run_costs
from flowgrpo_jax.train import train
from flowgrpo_jax.training.stages import Stages


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
        ("NVIDIA L40", 181e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 NVL", 835e12),
        ("TPU v5", 459e12),
        ("TPU v5e", 197e12),
        ("TPU v6e", 918e12),
        ("TPU v50", None),
        ("cpu", None),
    ],
)
def test_the_peak_of_a_device_by_its_name(kind, peak):
    assert hardware.peak(SimpleNamespace(device_kind=kind)) == peak


def test_guidance_doubles_the_work_of_a_pass(runs):
    plain = build_run(load(runs, sample__guidance_scale=1.0))
    guided = build_run(load(runs, sample__guidance_scale=3.0))
    work, gradient = run_costs.flop_of_pass(plain)
    assert run_costs.flop_of_pass(guided) == (2 * work, 2 * gradient)
    # Each of a linear's weights takes part in one multiplication and addition for each token, and
    # those of the modulation for each image alone: between one token's work and all tokens'.
    weights = sum(x.size for path, x in plain.model.base.items() if path.endswith("kernel"))
    height, width, _ = plain.model.latent_shape(plain.config.model.height, plain.config.model.width)
    tokens = height * width // 4 + 77 + plain.config.model.options.t5_length
    assert 2 * weights < work < 4 * weights * tokens


@pytest.mark.parametrize("remat", [False, True])
def test_a_gradient_needs_the_weights_gradient_only_where_they_are_trained(runs, remat):
    """Of a product y = x w: x, w and y's gradients make three products of one size. With an adapter
    that of w is left out; attention has no weights. What remat computes again is not counted."""
    adapter = run_costs.flop_of_pass(build_run(load(runs, model__remat=remat)))
    whole = run_costs.flop_of_pass(build_run(load(runs, model__remat=remat, lora__rank=0)))
    assert whole.gradient == pytest.approx(3 * whole.forward, rel=0.03)
    assert 1.9 * adapter.forward < adapter.gradient < 2.7 * adapter.forward


def test_the_share_of_the_peak_is_that_of_all_devices(runs, monkeypatch):
    run = build_run(load(runs))
    passes = run_costs.passes(run, 0)
    flop = run_costs.Flop(500.0, 1200.0)
    monkeypatch.setattr(hardware, "peak", lambda device: 1e6)
    found = run_costs.speed(run, flop, 0, seconds=2.0)
    assert found["images_per_second"] == run.plan.images / 2
    rate = run.plan.images / 2
    assert found["forwards_per_second"] == rate * (passes.forward + 3 * passes.gradient)
    work = rate * (passes.forward * 500 + passes.gradient * 1200)
    assert found["share_of_peak"] == pytest.approx(work / 1e6 / run.mesh.size)
    monkeypatch.setattr(hardware, "peak", lambda device: None)
    assert "share_of_peak" not in run_costs.speed(run, flop, 0, seconds=2.0)


def test_the_stages_of_an_epoch_add_up(monkeypatch):
    """Sampling in two parts of 3 and 4 seconds, and waiting from second 20 on."""
    now = iter([0, 0, 3, 10, 14, 20, 22, 23, 24, 25, 26])
    monkeypatch.setattr(time, "perf_counter", lambda: next(now))
    stages = Stages()
    for stage in ("sample", "sample", "wait"):
        with stages(stage):
            pass
    spent = {"seconds/sample": 7, "seconds/wait": 2}
    assert stages.figures() == {"seconds": 23, **spent}
    stages.count_rewards([(4, 10), (12, 14)])
    assert stages.figures() == {"seconds": 24, **spent, "seconds/rewards": 8, "hidden_rewards": 1}
    stages.count_rewards([(14, 22), (18, 22)])  # 6 + 2 of 12 seconds
    assert stages.figures()["hidden_rewards"] == pytest.approx(2 / 3)
    stages.count_rewards([(20, 22)] * 8)  # all threads at once, while the epoch waits
    assert stages.figures()["hidden_rewards"] == 0


def test_a_trace_of_one_epoch(runs, tmp_path):
    train(load(runs, epochs=2, eval__every=0), tmp_path / "run", profile=1)
    traces = [file for file in (tmp_path / "run" / "profile").rglob("*") if file.is_file()]
    assert traces and len(rows(tmp_path / "run")) == 2
