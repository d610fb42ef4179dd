"""Stopping on a signal and joining the other processes: what the entry points share."""

import os
import signal
import socket
import subprocess
import sys
from concurrent.futures import Future
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from etils import epath

from flowgrpo_jax.command_line import cli, connection, exit_status
from flowgrpo_jax.command_line.stop import Stop, Stopped


def test_a_run_that_failed_before_it_trained_can_be_begun_again(tmp_path):
    """It may have evaluated, and that may be the best so far."""
    (tmp_path / "run" / "best" / "0").mkdir(parents=True)
    cli.prepare(epath.Path(tmp_path / "run"), resume=False)
    assert not (tmp_path / "run" / "best").exists()
    (tmp_path / "run" / "checkpoints" / "0").mkdir(parents=True)  # epochs=0
    with pytest.raises(FileExistsError, match="already holds a run: add --resume"):
        cli.prepare(epath.Path(tmp_path / "run"), resume=False)
    (tmp_path / "run" / "checkpoints" / "0").rmdir()
    (tmp_path / "run" / "best" / "25").mkdir(parents=True)
    with pytest.raises(FileExistsError, match="already holds a run: add --resume"):
        cli.prepare(epath.Path(tmp_path / "run"), resume=False)
    cli.prepare(epath.Path(tmp_path / "run"), resume=True)
    assert (tmp_path / "run" / "best" / "25").exists()


def test_a_signal_and_its_echo_count_once(monkeypatch):
    """Ctrl-C reaches the process group and is forwarded by the launcher; a later one interrupts."""
    clock = SimpleNamespace(now=100.0)
    clocked = SimpleNamespace(monotonic=lambda: clock.now)
    monkeypatch.setattr("flowgrpo_jax.command_line.stop.time", clocked)
    with Stop() as stop:
        signal.raise_signal(signal.SIGINT)
        clock.now += 1
        try:
            signal.raise_signal(signal.SIGTERM)
        except KeyboardInterrupt:  # which would end pytest
            pytest.fail("the echo interrupts")
        assert stop.requested == signal.SIGINT
        clock.now += 1.5
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("done", [False, True])
def test_a_stop_of_another_process_ends_the_waiting(monkeypatch, done):
    """Scores may be there in this process and not in the other, which was asked to stop."""

    def allgather(mine):
        theirs = False if mine.dtype == bool else signal.SIGTERM
        return np.stack([mine, np.array(theirs, mine.dtype)])

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr("flowgrpo_jax.sharding.allgather", allgather)
    pending = Future()
    if done:
        pending.set_result("scores")
    with Stop() as stop, pytest.raises(Stopped) as stopped:
        stop.wait([pending])
    assert stopped.value.args == (signal.SIGTERM,)


def test_scores_are_waited_for_in_all_processes(monkeypatch):
    answers = iter([False, 0, False, 0, True])  # of the other process: scored? asked to stop?
    monkeypatch.setattr(
        "flowgrpo_jax.sharding.allgather",
        lambda mine: np.stack([mine, np.array(next(answers), mine.dtype)]),
    )
    pending = Future()
    pending.set_result("scores")
    with Stop() as stop:
        assert stop.wait([pending]) == ["scores"]
    assert not list(answers)


@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize("problem", ["UNAVAILABLE: a peer is gone", "RESOURCE_EXHAUSTED: memory"])
def test_a_lost_peer_asks_for_a_restart(joined, problem, monkeypatch):
    """One process alone has none to lose, and what does not fit will not fit next time."""
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: joined)
    lost = joined and "UNAVAILABLE" in problem
    outcome = SystemExit if lost else jax.errors.JaxRuntimeError
    with pytest.raises(outcome) as left, exit_status.exit_for_restart():
        raise jax.errors.JaxRuntimeError(problem)
    assert not lost or left.value.code == exit_status.RESTART


def test_a_stop_while_loading_asks_for_a_restart():
    with pytest.raises(SystemExit) as left, exit_status.exit_for_restart():
        signal.raise_signal(signal.SIGTERM)
    assert left.value.code == exit_status.RESTART


# What the launchers set, besides what is only JAX's concern.
SLURM = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "n[1-4]", "SLURM_STEP_NUM_NODES": "4"}
MPI = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_SIZE": "1"}
EIGHT = {"CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7"}
FLOWGRPO = {
    "FLOWGRPO_COORDINATOR": "one:8476",
    "FLOWGRPO_PROCESSES": "4",
    "FLOWGRPO_PROCESS": "3",
}
ALL, ITS_OWN = {"local_device_ids": []}, {"local_device_ids": None}


@pytest.mark.parametrize(
    "variables, expected",
    [
        ({}, None),
        ({"SLURM_NTASKS": "1"}, None),
        (SLURM | EIGHT | {"SLURM_NTASKS": "4"}, ((), ALL)),
        (SLURM | EIGHT | {"SLURM_NTASKS": "32"}, ((), ITS_OWN)),
        # --gpus-per-task=1: each task sees its own GPU alone, as number 0
        (SLURM | {"SLURM_NTASKS": "32", "CUDA_VISIBLE_DEVICES": "0"}, ((), ALL)),
        (SLURM | EIGHT | {"SLURM_NTASKS": "4", "JAX_LOCAL_DEVICE_IDS": "0,1"}, ((), ITS_OWN)),
        (MPI | EIGHT, ((), ALL)),
        (MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, ((), ITS_OWN)),
        # mpirun in a SLURM job: its daemons, not its processes, are the tasks
        (SLURM | {"SLURM_NTASKS": "4"} | MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "8"}, ((), ITS_OWN)),
        ({"TPU_WORKER_HOSTNAMES": "10.0.0.1,10.0.0.2"}, ((), ITS_OWN)),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, None),
        ({"FLOWGRPO_POD": "1"}, ((), ITS_OWN)),
        (FLOWGRPO, (("one:8476", 4, 3), {"cluster_detection_method": "deactivate"})),
        (
            FLOWGRPO | SLURM | {"SLURM_NTASKS": "32"},
            (("one:8476", 4, 3), {"cluster_detection_method": "deactivate"}),
        ),
    ],
)
def test_how_jax_is_told_to_join(monkeypatch, variables, expected):
    for name in os.environ:
        if name.startswith(("SLURM_", "OMPI_", "TPU_", "MEGASCALE_", "FLOWGRPO_", "CUDA_", "JAX_")):
            monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *a, **k: calls.append((a, k)))
    connection.connect()
    assert calls == ([expected] if expected else [])


def test_jax_understands_that_all_devices_are_meant():
    """The installed JAX, in a SLURM task that is alone on its node: no GPU is hidden from it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    task = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "127.0.0.1", "SLURM_STEP_NUM_NODES": "1"}
    task |= {"SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    names = ("OMPI_", "FLOWGRPO_", "CUDA_", "JAX_LOCAL")
    outside = {k: v for k, v in os.environ.items() if not k.startswith(names)}
    script = (
        "import jax; from flowgrpo_jax.command_line import connection; connection.connect();"
        " print(jax.distributed.is_initialized(), jax.config.values['jax_cuda_visible_devices'])"
    )
    out = subprocess.run(
        [sys.executable, "-c", script],
        env=outside | task | {"JAX_COORDINATOR_PORT": str(port), "FLOWGRPO_POD": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert out.stdout.split() == ["True", "all"], out.stdout + out.stderr
