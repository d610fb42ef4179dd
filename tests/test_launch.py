"""The launchers of one machine, of machines behind ssh and of SLURM."""

import fcntl
import os
import pty
import shutil
import signal
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from launchers import LAUNCH, call, calls, command, environment, wait_for

# A run that ends as the file `ends` says, one exit status a line.
TRAIN = """
echo "$@" >> calls
status=$(head -n 1 ends); sed -i 1d ends
exit "${status:-0}"
"""


def test_a_run_is_started_again_until_it_is_done(tmp_path):
    command(tmp_path, "train", TRAIN)
    (tmp_path / "ends").write_text("75\n134\n137\n0\n0\n")
    result = call(tmp_path, "run.sh", "train", "--workdir", "gs://a/b")
    assert result.returncode == 0, result.stderr
    assert calls(tmp_path) == 4 * ["--workdir gs://a/b --resume"]
    assert result.stderr.count("launch/run.sh: ended with") == 3


@pytest.mark.parametrize("status", [1, 2])
def test_an_error_is_not_repeated(tmp_path, status):
    command(tmp_path, "train", TRAIN)
    (tmp_path / "ends").write_text(f"{status}\n")
    result = call(tmp_path, "run.sh", "train", "--workdir=runs/x")
    assert result.returncode == status and len(calls(tmp_path)) == 1


def test_restarts_are_bounded(tmp_path):
    command(tmp_path, "train", TRAIN)
    (tmp_path / "ends").write_text("75\n" * 9)
    assert call(tmp_path, "run.sh", "train", "--workdir=runs/x", RESTARTS="2").returncode == 75
    assert len(calls(tmp_path)) == 3


def launch(folder, *arguments, stderr=None, **more):
    """`run.sh` in a process group of its own, once the run is up."""
    process = subprocess.Popen(
        [LAUNCH / "run.sh", *arguments],
        cwd=folder,
        env=environment(folder, **more),
        stderr=stderr,
        text=True,
        start_new_session=True,
    )
    wait_for(folder / "up")
    return process


# Up until a signal comes, then a while of saving.
SAVES = """
trap 'echo > asked; until [[ -e go ]]; do sleep 0.02; done; echo > saved; exit 75' TERM
echo > up; sleep 30 & wait
"""


def test_sigterm_reaches_the_run_and_ends_the_launcher(tmp_path):
    """Also when it comes again while the run is saving."""
    command(tmp_path, "train", SAVES)
    process = launch(tmp_path, "train", "--workdir", "runs/x")
    process.send_signal(signal.SIGTERM)
    wait_for(tmp_path / "asked")
    process.send_signal(signal.SIGTERM)
    (tmp_path / "go").touch()
    assert process.wait(120) == 75 and (tmp_path / "saved").exists()


# The real `Stop`, and a loop around it like train's.
STOPS = """
import signal, sys, time
from pathlib import Path
from flowgrpo_jax.command_line import exit_status
from flowgrpo_jax.command_line.stop import Stop
from flowgrpo_jax.command_line import cli

with Stop() as stop:
    Path("up").touch()
    while not stop.requested:
        time.sleep(0.01)
    time.sleep(0.5)
    Path("saved").touch()
sys.exit(exit_status.RESTART if stop.requested == signal.SIGTERM else 0)
"""


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 0), (signal.SIGTERM, 75)])
def test_a_signal_to_the_whole_group_saves(tmp_path, number, status):
    """Ctrl-C, and SLURM's signals: the run has it from the group and from the launcher."""
    (tmp_path / "train.py").write_text(STOPS)
    process = launch(tmp_path, sys.executable, "train.py", PYTHONPATH=str(LAUNCH.parent))
    os.killpg(process.pid, number)
    assert process.wait(120) == status and (tmp_path / "saved").exists()


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 0), (signal.SIGTERM, 75)])
def test_a_signal_to_the_launcher_alone_is_passed_on_as_it_is(tmp_path, number, status):
    """`kill` reaches only the launcher. Before the run has a handler, Ctrl-C ends it as well."""
    command(tmp_path, "train", "trap 'exit 0' INT; trap 'exit 75' TERM; echo > up; sleep 30 & wait")
    process = launch(tmp_path, "train")
    process.send_signal(number)
    assert process.wait(120) == status


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_a_signal_between_two_starts_ends_the_launcher(tmp_path, number, status):
    """After Ctrl-C not with the status on which SLURM would start it again."""
    command(tmp_path, "train", "echo >> calls; echo > up; exit 134")
    process = launch(tmp_path, "train", PAUSE="30", stderr=subprocess.PIPE)
    assert any("ended with 134" in line for line in process.stderr)
    process.send_signal(number)
    assert process.wait(120) == status and len(calls(tmp_path)) == 1


def test_tests_hear_interrupts_in_a_background_job():
    """A shell without job control starts those with SIGINT ignored."""
    code = "import conftest; conftest.hear_interrupts(); import os; os.kill(os.getpid(), 2)"
    done = subprocess.run(
        ["bash", "-c", """trap '' INT; exec "$0" -c "$1" """, sys.executable, code],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
    )
    assert "KeyboardInterrupt" in done.stderr


def test_sigterm_before_the_run_has_a_handler_asks_for_a_start_as_well(tmp_path):
    """Nothing is lost yet, and `srun`, which gives the highest status, must not hide the 75 of the
    others behind the 143 of this one."""
    command(tmp_path, "train", "echo > up; exec sleep 30")
    process = launch(tmp_path, "train")
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) == 75


SSH = """
while [[ $1 == -* ]]; do [[ $1 == -o ]] && shift; shift; done
host=$1; shift
HOST=$host bash -c "$*"
"""


def test_ssh_starts_one_process_a_host_with_its_number(tmp_path):
    command(tmp_path, "ssh", SSH)
    command(tmp_path, "python", 'echo "$HOST $FLOWGRPO_PROCESS/$FLOWGRPO_PROCESSES '
                                '$FLOWGRPO_COORDINATOR $*" >> calls')  # fmt: skip
    shutil.copytree(LAUNCH, tmp_path / "launch")
    arguments = ["--config", "a b.py", "--workdir", "/tmp/none"]
    result = call(tmp_path, "ssh.sh", *arguments, HOSTS="one two three")
    assert result.returncode == 0, result.stdout + result.stderr
    assert sorted(calls(tmp_path)) == sorted(
        f"{host} {i}/3 one:8476 -m flowgrpo_jax.train --config a b.py --workdir /tmp/none --resume"
        for i, host in enumerate(["one", "two", "three"])
    )


def test_ssh_fails_when_one_host_fails(tmp_path):
    command(tmp_path, "ssh", SSH)
    command(tmp_path, "python", '[[ $HOST == one ]] && exit 1; echo > "up-$HOST"; exec sleep 5')
    shutil.copytree(LAUNCH, tmp_path / "launch")
    result = call(tmp_path, "ssh.sh", "--workdir", "/tmp/none", HOSTS="one two")
    assert result.returncode != 0 and "[one]" in result.stdout


# Up until it is asked to end; then it saves, and says so. A host may be deaf, or fail to save.
SAVING = """
trap '[[ $HOST == "$FAILING" ]] && { sleep 1; exit 1; }; echo > "saved-$HOST"; exit 75' TERM
[[ $HOST == "$DEAF" ]] && trap "" TERM
echo > "up-$HOST"; for _ in {1..600}; do sleep 0.05; done
"""


def saving(folder, options, **more):
    """`ssh.sh` on two machines, once both are up."""
    command(folder, "ssh", SSH)
    command(folder, "python", SAVING)
    shutil.copytree(LAUNCH, folder / "launch")
    process = subprocess.Popen(
        [LAUNCH / "ssh.sh", "--workdir", "/tmp/none"],
        cwd=folder,
        env=environment(folder, HOSTS="one two", **more),
        start_new_session=True,
        **options,
    )
    wait_for(folder / "up-one")
    wait_for(folder / "up-two")
    return process


def test_ssh_tells_every_machine_to_save(tmp_path):
    """At Ctrl-C in a terminal, which sends it to the foreground alone."""
    terminal, inside = pty.openpty()

    def control():
        fcntl.ioctl(inside, termios.TIOCSCTTY, 0)

    process = saving(tmp_path, {"stdin": inside, "preexec_fn": control})
    os.write(terminal, b"\x03")
    assert process.wait(120) == 75
    assert (tmp_path / "saved-one").exists() and (tmp_path / "saved-two").exists()
    os.close(inside)
    os.close(terminal)


def test_ssh_hangs_up_on_a_machine_that_does_not_end(tmp_path):
    process = saving(tmp_path, {}, GRACE="2", DEAF="one")
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) != 0 and (tmp_path / "saved-two").exists()


def test_ssh_ends_with_the_failure_of_a_machine_though_others_have_saved_before(tmp_path):
    process = saving(tmp_path, {}, FAILING="two")
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) == 1 and (tmp_path / "saved-one").exists()


def test_slurm_puts_a_saved_run_back_into_the_queue(tmp_path):
    command(tmp_path, "scontrol", 'echo "scontrol $*" >> calls')
    job = {"SLURM_JOB_ID": "42", "SLURM_CPUS_PER_TASK": "24"}
    for status, expected in ((75, ["srun", "scontrol requeue 42"]), (0, ["srun"]), (1, ["srun"])):
        (tmp_path / "calls").unlink(missing_ok=True)
        command(tmp_path, "srun", f'echo srun >> calls; echo "$*" > line; exit {status}')
        result = call(tmp_path, "slurm.sh", "--workdir", "w", **job)
        assert result.returncode == status and calls(tmp_path) == expected
    line = (tmp_path / "line").read_text()
    assert "launch/run.sh python -m flowgrpo_jax.train --workdir w" in line
    assert "--kill-on-bad-exit=0" in line  # the first to have saved must not end the others
    assert "--cpus-per-task=24" in line  # srun does not take it over from sbatch
