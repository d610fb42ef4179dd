"""One device, eight as data, tensor or all axes, and two processes: the same training."""

import json

import numpy as np
import pytest
from PIL import Image
from processes import outcome, spawn_each, start, wait_for
from tiny_model import MMDIT

from flowgrpo_jax.models.sd3.mmdit import MMDiT
from flowgrpo_jax.storage import logs
from flowgrpo_jax.worlds.pretraining import package

pytestmark = pytest.mark.usefixtures("nothing_goes_on")
LAYOUTS = {  # each is compiled anew; fsdp alone, and the callback, are in two processes below
    "data": {"data": 8},
    "tensor": {"data": 1, "tensor": 8},
    "all": {"data": 2, "fsdp": 2, "tensor": 2},
}
# {how rewards are called: the layout}. In the second one, each process has a half of every group.
TWO_PROCESSES = {"overlap": {"data": 4, "fsdp": 2}, "callback": {"data": 1, "fsdp": 8}}


@pytest.fixture(scope="module")
def one_device(folder):
    runs = [("one", {"data": 1}), ("full-one", {"data": 1})]
    wait_for(spawn_each(folder, runs, devices=1))
    rows, ema = outcome(folder, "one")
    assert len(rows) == 3 and max(row.get("ratio_gap", 0) for row in rows) < 1e-5
    moved = [np.abs(x).max() for k, x in ema.items() if k.endswith("lora_b")]
    assert np.median(moved) > 1e-5
    return rows, ema


def same(ours, theirs, within=2e-3):
    for mine, other in zip(ours[0], theirs[0], strict=True):
        gap = mine.pop("ratio_gap", 0), other.pop("ratio_gap", 0)
        assert max(gap) < 3e-5  # rounding: the sampler and the update are two programs
        measured = {name for name, value in other.items() if value is not None}
        assert measured == {name for name, value in mine.items() if value is not None}
        # Losses are sums of advantages near 0: what is left of them is rounding.
        for name in measured:
            assert mine[name] == pytest.approx(other[name], rel=within, abs=5e-5), name
    for path, x in theirs[1].items():
        size = np.abs(x).max()
        np.testing.assert_allclose(ours[1][path], x, atol=within * size + 1e-9, err_msg=path)


def same_pictures(folder, ours, theirs):
    """The evaluation's, before training: the same noise drew them, on whatever devices."""
    mine, other = (
        np.asarray(Image.open(folder / name / "samples" / "epoch-00000.png"), int)
        for name in (ours, theirs)
    )
    assert np.abs(mine - other).max() <= 1 and other.std() > 5


@pytest.fixture(scope="module")
def eight_devices(folder):
    """All layouts of eight devices, in one process, and full fine-tuning in one of them."""
    wait_for(spawn_each(folder, [*LAYOUTS.items(), ("full-eight", LAYOUTS["all"])], devices=8))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_layout_does_not_change_the_result(folder, one_device, eight_devices, layout):
    same(outcome(folder, layout), one_device)
    same_pictures(folder, layout, "one")


def test_the_layout_does_not_change_full_fine_tuning(folder, one_device, eight_devices):
    one = outcome(folder, "full-one")
    base = package.read(folder / "model", {"transformer": lambda rngs: MMDiT(MMDIT, rngs=rngs)})
    moved = [np.abs(x - base["transformer"][path]).max() for path, x in one[1].items()]
    assert np.median(moved) > 1e-5
    same(outcome(folder, "full-eight"), one, within=1e-2)  # biases move little, rounding as ever


@pytest.fixture(scope="module", params=TWO_PROCESSES)
def two_processes(folder, request):
    name = f"two-{request.param}"
    mesh = TWO_PROCESSES[request.param]
    start(folder, name, mesh, request.param, devices=8, processes=2)
    return name


def test_two_processes_train_as_one(folder, one_device, two_processes):
    same(outcome(folder, two_processes), one_device)
    same_pictures(folder, two_processes, "one")
    # Of 2 epochs of 16 images and 2 evaluations of 8, each process scored its half.
    scored = [(folder / f"scored-{two_processes}-{i}").read_text() for i in (0, 1)]
    assert scored == ["24", "24"]


def test_groups_and_epochs_are_whole_in_two_processes(folder, one_device, two_processes):
    """Though each process may hold a half of every group: the ranks of eight images are multiples
    of 1/7, each group is ranked by one process, and the distances are those from the mean colour
    of the epoch."""
    for mine, alone in zip(outcome(folder, two_processes)[0][:2], one_device[0], strict=False):
        assert mine["reward/processes:rank"] == pytest.approx(0.5)
        name = "reward/processes:distance"
        assert mine[name] == pytest.approx(alone[name], rel=2e-3)
    alone, first, second = (
        json.loads((folder / f"ranked-{name}").read_text())
        for name in ("one-0", f"{two_processes}-0", f"{two_processes}-1")
    )
    assert first.count(8) == second.count(8) == 2 and sorted(first + second) == sorted(alone)
    assert sum(alone) == 2 * 16 + 2 * 8  # two epochs and two evaluations


def test_a_run_goes_on_in_another_layout(folder, one_device):
    """An epoch on 8 devices of two processes, an epoch on one device."""
    start(folder, "moved", {"data": 4, "fsdp": 2}, devices=8, processes=2, epochs=1)
    start(folder, "moved", {"data": 1}, devices=1)
    ours, theirs = outcome(folder, "moved"), one_device
    assert [row["epoch"] for row in ours[0]] == [0, 1, 2]
    # A run that ends after an epoch has one more evaluation, which is kept when it goes on.
    between = {k: v for k, v in ours[0][1].items() if not k.startswith(logs.EVALUATED)}
    same(([ours[0][0], between, ours[0][2]], ours[1]), theirs)
