"""A process is killed, told to stop, or cannot read: nothing is lost."""

import shutil
import signal
import time

import jax
import numpy as np
import pytest
from processes import HERE, PAIR, final_state, outcome, spawn, start

from flowgrpo_jax.checkpoints.checkpoint import Checkpoints
from flowgrpo_jax.command_line import exit_status

pytestmark = pytest.mark.usefixtures("nothing_goes_on")


@pytest.fixture(scope="module")
def undisturbed(folder):
    start(folder, "undisturbed", **PAIR)
    return outcome(folder, "undisturbed")[0], final_state(folder, "undisturbed")


def exactly(folder, name, undisturbed):
    metrics, state = undisturbed
    assert outcome(folder, name)[0] == metrics
    jax.tree.map(np.testing.assert_array_equal, final_state(folder, name), state)


def test_a_killed_process_costs_a_restart(folder, undisturbed):
    """One of two processes is killed in the middle of the second epoch. The other one ends by
    itself, the launchers start both again, and the run is, bit for bit, the one that was never
    killed."""
    kill = {"KILL_AT_CALL": "4", "KILL_AFTER": str(folder / "killed" / "checkpoints" / "1")}
    launcher = [HERE.parent / "launch" / "run.sh"]
    children = spawn(
        folder,
        "killed",
        **PAIR,
        last=kill | {"PAUSE": "5"},
        launcher=launcher,
    )
    outputs = [child.communicate(timeout=600)[0] for child in children]
    assert [child.returncode for child in children] == [0, 0], outputs
    assert all("launch/run.sh: ended with" in output for output in outputs), outputs
    assert "ended with 137" in outputs[1]
    exactly(folder, "killed", undisturbed)


def test_a_kill_costs_a_restart(folder):
    """The same of a run that is one process."""
    start(folder, "straight", {"data": 1}, devices=1)
    last = {"KILL_AT_CALL": "5", "KILL_AFTER": str(folder / "alone" / "checkpoints" / "1")}
    (child,) = spawn(folder, "alone", {"data": 1}, devices=1, last=last)
    output = child.communicate(timeout=600)[0]
    assert child.returncode == -signal.SIGKILL, output
    torn = folder / "alone" / "checkpoints" / "9.orbax-checkpoint-tmp"
    torn.mkdir()  # of a step that is not written again: what a kill in the middle of a save leaves
    start(folder, "alone", {"data": 1}, devices=1)
    exactly(folder, "alone", (outcome(folder, "straight")[0], final_state(folder, "straight")))
    assert not torn.exists()


def test_a_stop_while_loading_ends_both_at_once(folder):
    """There is nothing to save yet; the status is the one on which launchers start again."""
    loading = {"LOADS_LONG": "yes"}
    children = spawn(folder, "early", **PAIR, each=loading)
    for child in children:
        assert any("loading" in line for line in child.stdout)
        child.send_signal(signal.SIGTERM)
    assert [child.wait(300) for child in children] == [exit_status.RESTART] * 2


def test_one_process_is_told_to_stop_and_both_save(folder, undisturbed):
    """SIGTERM to one of two: both leave after the same epoch with the status for a restart."""
    children = spawn(folder, "stopped", **PAIR, epochs=100_000)
    log, deadline = folder / "stopped" / "metrics.jsonl", time.monotonic() + 600
    while not (log.exists() and len(log.read_text().splitlines()) >= 2):
        assert time.monotonic() < deadline and all(child.poll() is None for child in children)
        time.sleep(0.1)
    children[1].send_signal(signal.SIGTERM)
    outputs = [child.communicate(timeout=600)[0] for child in children]
    assert [child.returncode for child in children] == [exit_status.RESTART] * 2, outputs
    done = len(log.read_text().splitlines())
    assert Checkpoints(folder / "stopped" / "checkpoints").steps()[-1] == done
    # The third row of the undisturbed run is its last evaluation; the stopped one went on instead.
    assert outcome(folder, "stopped")[0][:2] == undisturbed[0][:2]


def test_both_stop_though_a_reward_of_one_does_not_return(folder):
    asleep = {"SLEEP_AT_CALL": "4"}  # in the second epoch
    children = spawn(folder, "sleeper", **PAIR, last=asleep)
    assert any("it sleeps" in line for line in children[1].stdout)
    children[0].send_signal(signal.SIGTERM)
    outputs = [child.communicate(timeout=100)[0] for child in children]
    assert [child.returncode for child in children] == [exit_status.RESTART] * 2, outputs
    assert "leaving without it" in outputs[1]
    assert Checkpoints(folder / "sleeper" / "checkpoints").steps() == [1]


def test_two_processes_pass_over_a_damaged_checkpoint(folder, undisturbed):
    shutil.copytree(folder / "undisturbed", folder / "torn")
    for file in (folder / "torn" / "checkpoints" / "2").rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[:-9])
    start(folder, "torn", **PAIR)
    exactly(folder, "torn", undisturbed)
    assert Checkpoints(folder / "torn" / "checkpoints").steps() == [1, 2]


def test_both_pass_over_a_checkpoint_that_one_cannot_read(folder, undisturbed):
    shutil.copytree(folder / "undisturbed", folder / "half")
    last = {"UNREADABLE": "2"}
    first, _ = start(folder, "half", **PAIR, last=last)
    assert "2 cannot be read: another process of the run" in first
    exactly(folder, "half", undisturbed)
