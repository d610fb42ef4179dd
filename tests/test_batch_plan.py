"""The plan of a batch, by hand; and batches that nothing divides are errors that say what would."""

import pytest
from changed_recipe import load
from ml_collections import ConfigDict

from flowgrpo_jax.assembly import batch_plan, settings

# ----------------------------------------------------------------------------------------- the plan


@pytest.mark.parametrize(
    "updates, micro_batch, size, count",
    [
        (2, 0, 4, 144),  # 0: derived, 4 of 512 px a device
        (2, 9, 9, 64),
        (2, 32, 32, 18),
        (2, 144, 144, 4),
        (1, 576, 576, 2),
        (1, 24, 24, 48),
        (48, 8, 8, 3),  # a group an update
    ],
)
def test_plan_of_the_papers_48_groups_of_24(updates, micro_batch, size, count):
    changes = {"train.updates_per_epoch": updates, "sample.micro_batch": micro_batch}
    plan = batch_plan.make_plan(load("base", changes), devices=1)
    assert (plan.images, plan.updates) == (1152, updates)
    assert (plan.micro_batch, plan.micro_batches) == (size, count)
    assert plan.images == updates * count * size
    for number in (48, 24, 1152, updates, count, size):
        assert str(number) in str(plan).split()


def test_the_plan_does_not_depend_on_the_devices_that_share_it():
    config = load("base", {"sample.micro_batch": 32})
    assert len({batch_plan.make_plan(config, devices) for devices in (1, 2, 8, 32)}) == 1


@pytest.mark.parametrize(
    "side, devices, size",
    [
        (512, 4, 16),
        (512, 8, 32),
        (512, 16, 64),
        (512, 64, 192),
        (1024, 8, 8),
        (64, 1, 192),
        (64, 8, 576),
    ],
)
def test_a_micro_batch_is_derived(side, devices, size):
    """The largest divisor of an update's 576 images with few enough pixels for each device."""
    config = load("base", {"model.height": side, "model.width": side})
    assert batch_plan.make_plan(config, devices).micro_batch == size


# --------------------------------------------------------------------------------------- the errors


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"sample.group_size": 1}, r"sample\.group_size=1: .*at least 2"),
        (
            {"sample.groups": 48, "train.updates_per_epoch": 5},
            r"sample\.groups=48 .*multiple of train\.updates_per_epoch=5",
        ),
        ({"train.updates_per_epoch": 0}, r"train\.updates_per_epoch=0"),
        (
            {"sample.micro_batch": 100},
            r"sample\.micro_batch=100 .*576 images.*8 equal parts: choose from .*96, .*or 0",
        ),
        ({"sample.micro_batch": -4}, r"sample\.micro_batch=-4"),
        (
            {"sample.micro_batch": 36},
            r"sample\.micro_batch=36 .*8 equal parts: choose from .*24, 32, 48, .*or 0",
        ),
        (
            {"sample.micro_batch": 32, "eval.micro_batch": 12},
            r"eval\.micro_batch=12 .*8 equal parts.*a multiple of 8, or 0",
        ),
    ],
)
def test_batch_arithmetic_that_does_not_come_out_even(changes, message):
    with pytest.raises(ValueError, match=message):
        batch_plan.make_plan(load("base", changes), devices=8)


@pytest.mark.parametrize(
    "name, least, message",
    [
        ("dgpo", 24, r"dgpo needs whole groups in each: choose from 24, 48, 72, .*or 0"),
        ("crd", 576, r"crd needs all of them in one: choose from 576, or 0"),
    ],
)
def test_a_micro_batch_that_has_to_be_whole(name, least, message):
    """The derived one grows beyond what is at once elsewhere; one of half a group is refused."""
    algorithm = ConfigDict({"name": name, "options": {}})
    changes = {"algorithm": algorithm, "sample.micro_batch": 0}
    assert batch_plan.make_plan(load("base", changes), devices=1).micro_batch == least
    with pytest.raises(ValueError, match=r"sample\.micro_batch=12 .*" + message):
        batch_plan.make_plan(load("base", changes | {"sample.micro_batch": 12}), devices=1)
    config = load("base", changes | {"sample.micro_batch": least})
    assert batch_plan.make_plan(config, devices=8).micro_batch == least


@pytest.mark.parametrize("micro_batch", [0, 10])
@pytest.mark.parametrize(
    "batch, devices, of, parts",
    [((5, 20, 1), 8, 2, 4), ((48, 24, 2), 256, 64, 64), ((6, 7, 3), 4, 12, 2)],
)
def test_an_update_that_the_devices_do_not_divide(batch, devices, of, parts, micro_batch):
    """No micro-batch helps there. The error says what does, and it does."""
    knobs = ("sample.groups", "sample.group_size", "train.updates_per_epoch")
    config = load("base", dict(zip(knobs, batch)) | {"sample.micro_batch": micro_batch})
    fix = rf"sample\.groups to a multiple of {of},.*mesh\.tensor .* {parts} parts"
    with pytest.raises(
        ValueError, match=rf"images of an update.*{devices} equal parts.*{fix}"
    ) as e:
        batch_plan.make_plan(config, devices)
    assert all(knob in str(e.value) for knob in knobs) and "micro_batch" not in str(e.value)
    config.sample.micro_batch = 0
    batch_plan.make_plan(config, parts)
    for n in (1, 3):
        config.sample.groups = n * of
        batch_plan.make_plan(config, devices)


# ----------------------------------------------------------------------------- the devices of a CPU


@pytest.mark.parametrize(
    "changes, cores, devices",
    [
        ({}, 2, 2),
        ({}, 10, 9),  # 144 images at once are not cut in ten
        ({"sample.micro_batch": 0}, 7, 6),  # a micro-batch to be derived: of 288 images
        ({"eval.micro_batch": 14}, 8, 2),
        ({"cpu_devices": 1}, 8, 1),
        ({"cpu_devices": 3}, 8, 3),
        ({"mesh.data": 1}, 8, 1),  # a mesh that is given in full says how many
        ({"mesh.data": 2, "mesh.tensor": 2}, 2, 4),
        ({"mesh.fsdp": 2}, 9, 8),
    ],
)
def test_a_cpu_is_split_as_the_batch_can_be(changes, cores, devices, monkeypatch):
    chosen = {}
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    monkeypatch.setattr(settings.os, "sched_getaffinity", lambda _: range(cores), raising=False)
    monkeypatch.setattr(settings.jax.config, "update", chosen.__setitem__)
    settings.split_cpu(config := load("shapes", changes))
    assert chosen.get("jax_num_cpu_devices", 1) == devices
    if not config.cpu_devices:
        batch_plan.make_plan(config, devices)  # and it divides all


def test_who_has_split_the_cpu_keeps_it(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
    monkeypatch.setattr(settings.jax.config, "update", lambda *_: pytest.fail("split again"))
    settings.split_cpu(load("shapes", {}))
