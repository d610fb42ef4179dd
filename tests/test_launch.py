"""The launchers, run here on stand-ins for the programs that they call on clusters."""

import configparser
import fcntl
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import termios
import time
from contextlib import suppress
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parent.parent / "launch"


def command(folder, name, script):
    """Put an executable of this name in front of the path."""
    file = folder / "bin" / name
    file.parent.mkdir(exist_ok=True)
    file.write_text(f"#!/usr/bin/env bash\n{script}\n")
    file.chmod(0o755)


def environment(folder, **more):
    return {**os.environ, "PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "PAUSE": "0.05", **more}


def call(folder, script, *arguments, **more):
    return subprocess.run(
        [LAUNCH / script, *arguments],
        cwd=folder,
        env=environment(folder, **more),
        capture_output=True,
        text=True,
        timeout=60,
    )


def calls(folder):
    return (folder / "calls").read_text().splitlines()


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


def launch(folder, *arguments, **more):
    """`run.sh` in a process group of its own, once the run is up."""
    process = subprocess.Popen(
        [LAUNCH / "run.sh", *arguments],
        cwd=folder,
        env=environment(folder, **more),
        start_new_session=True,
    )
    wait_for(folder / "up")
    return process


def wait_for(file):
    end = time.monotonic() + 60
    while not file.exists():
        assert time.monotonic() < end, f"{file} did not appear"
        time.sleep(0.02)


# Up until a signal comes, then a while of saving.
SAVES = "trap 'echo > asked; sleep 0.5; echo > saved; exit 75' TERM; echo > up; sleep 30 & wait"


def test_sigterm_reaches_the_run_and_ends_the_launcher(tmp_path):
    """Also when it comes again while the run is saving."""
    command(tmp_path, "train", SAVES)
    process = launch(tmp_path, "train", "--workdir", "runs/x")
    process.send_signal(signal.SIGTERM)
    wait_for(tmp_path / "asked")
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 75 and (tmp_path / "saved").exists()


# The real `Stop`, and a loop around it like train's.
STOPS = """
import signal, sys, time
from pathlib import Path
from flowgrpo_jax import cli

with cli.Stop() as stop:
    Path("up").touch()
    while not stop.requested:
        time.sleep(0.01)
    time.sleep(0.5)
    Path("saved").touch()
sys.exit(cli.RESTART if stop.requested == signal.SIGTERM else 0)
"""


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 0), (signal.SIGTERM, 75)])
def test_a_signal_to_the_whole_group_saves(tmp_path, number, status):
    """Ctrl-C, and SLURM's signals: the run has it from the group and from the launcher."""
    (tmp_path / "train.py").write_text(STOPS)
    process = launch(tmp_path, sys.executable, "train.py", PYTHONPATH=str(LAUNCH.parent))
    os.killpg(process.pid, number)
    assert process.wait(60) == status and (tmp_path / "saved").exists()


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 0), (signal.SIGTERM, 75)])
def test_a_signal_to_the_launcher_alone_is_passed_on_as_it_is(tmp_path, number, status):
    """`kill` reaches only the launcher. Before the run has a handler, Ctrl-C ends it as well."""
    command(tmp_path, "train", "trap 'exit 0' INT; trap 'exit 75' TERM; echo > up; sleep 30 & wait")
    process = launch(tmp_path, "train")
    process.send_signal(number)
    assert process.wait(20) == status


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_a_signal_between_two_starts_ends_the_launcher(tmp_path, number, status):
    """After Ctrl-C not with the status on which SLURM would start it again."""
    command(tmp_path, "train", "echo >> calls; echo > up; exit 134")
    process = launch(tmp_path, "train", PAUSE="30")
    time.sleep(0.5)  # whether it waits by then or not
    process.send_signal(number)
    assert process.wait(20) == status and len(calls(tmp_path)) == 1


def test_sigterm_before_the_run_has_a_handler_asks_for_a_start_as_well(tmp_path):
    """Nothing is lost yet, and `srun`, which gives the highest status, must not hide the 75 of the
    others behind the 143 of this one."""
    command(tmp_path, "train", "echo > up; exec sleep 30")
    process = launch(tmp_path, "train")
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 75


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
    assert process.wait(30) == 75
    assert (tmp_path / "saved-one").exists() and (tmp_path / "saved-two").exists()
    os.close(inside)
    os.close(terminal)


def test_ssh_hangs_up_on_a_machine_that_does_not_end(tmp_path):
    process = saving(tmp_path, {}, GRACE="2", DEAF="one")
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) != 0 and (tmp_path / "saved-two").exists()


def test_ssh_ends_with_the_failure_of_a_machine_though_others_have_saved_before(tmp_path):
    process = saving(tmp_path, {}, FAILING="two")
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 1 and (tmp_path / "saved-one").exists()


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


# Says the state of the slice as the file `states` does, the last one for ever, and runs what is
# sent to the workers, which are folders here. Slices are refused as often as `refusals` says.
GCLOUD = """
echo "$@" >> calls
case "$*" in
  *" queued-resources describe "*) head -n 1 queue; sed -i 1d queue ;;
  *" describe "*)
    state=$(head -n 1 states); [[ $(wc -l < states) -gt 1 ]] && sed -i 1d states
    case $state in
      ABSENT) echo "ERROR: NOT_FOUND: no such node" >&2; exit 1 ;;
      MUTE) echo "ERROR: no connection" >&2; exit 1 ;;
      *) echo "$state" ;;
    esac ;;
  *" create "*)
    if [[ -s refusals ]]; then sed -i 1d refusals; exit 1; fi ;;
  *" ssh "*)
    [[ -e deaf ]] && { rm deaf; exit 255; }
    for worker in worker-*; do
      [[ -e $worker/deaf ]] && { failed=255; continue; }
      (cd "$worker" && HOME=$PWD bash -c "${!#}") || failed=$?
    done
    exit "${failed:-0}" ;;
esac
"""
UV = """
[[ -e $HOME/broken ]] && { rm "$HOME/broken"; exit 1; }
[[ $1 == venv ]] && mkdir -p .venv/bin && cp "$HOME/../bin/train" .venv/bin/python
echo "uv $*" >> ../../calls
"""


def given(folder):
    return {
        "NAME": "pod",
        "ZONE": "z",
        "TYPE": "v6e-64",
        "REPOSITORY": str(folder / "origin"),
        "REVISION": "v1",
    }


def pod(folder, *arguments, **more):
    return call(folder, "tpu_pod.sh", *arguments, **given(folder), **more)


@pytest.fixture
def cloud(tmp_path):
    """Two workers, a repository to clone, and a program in the place of Python that runs until the
    file `ends`, of all workers or of its own, holds its exit status."""
    command(tmp_path, "gcloud", GCLOUD)
    command(
        tmp_path,
        "train",
        'trap "exit 75" TERM; echo "train $FLOWGRPO_POD $*" >> ../../calls\n'
        "until cat ends ../../ends 2>/dev/null | grep -q .; do sleep 0.05; done\n"
        "exit $(cat ends ../../ends 2>/dev/null | head -n 1)",
    )
    for worker in ("worker-0", "worker-1"):
        (tmp_path / worker / ".uv").mkdir(parents=True)
        uv = tmp_path / worker / ".uv" / "uv"
        uv.write_text(f"#!/usr/bin/env bash\n{UV}")
        uv.chmod(0o755)
    shutil.copytree(LAUNCH, tmp_path / "origin" / "launch")
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    for step in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "x"], ["tag", "v1"]):
        subprocess.run([*git, *step], cwd=tmp_path / "origin", check=True)
    (tmp_path / "states").write_text("READY\n")
    (tmp_path / "queue").write_text("")
    yield tmp_path
    for watching in watches:  # those of a test that has failed
        watching.kill()
    watches.clear()
    (tmp_path / "ends").write_text("0")  # whatever still runs ends


def trained(folder):
    return [line for line in calls(folder) if line.startswith("train")]


def wait_until(true):
    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_pod_is_made_installed_and_started(cloud):
    for step in (("create",), ("install",), ("start", "--config", "a b.py")):
        result = pod(cloud, *step, EXTRAS="tpu,torch")
        assert result.returncode == 0, result.stderr
    wait_until(lambda: len(trained(cloud)) == 2)
    lines = calls(cloud)
    assert any("tpu-vm create pod --zone z --accelerator-type v6e-64" in line for line in lines)
    # the machines' own Python is 3.10
    assert lines.count("uv venv -q --python 3.12 .venv") == 2
    assert lines.count("uv pip install -q -e .[tpu,torch,bucket]") == 2
    assert trained(cloud) == ["train 1 -m flowgrpo_jax.train --config a b.py --resume"] * 2
    assert pod(cloud, "start", "--config", "a b.py").returncode == 0  # it is up already
    (cloud / "ends").write_text("0")
    wait_until(lambda: (cloud / "worker-1" / "flowgrpo_jax" / "train.status").exists())
    assert len(trained(cloud)) == 2
    assert pod(cloud, "delete").returncode == 0


def test_a_pod_that_is_stopped_saves(cloud):
    command(cloud, "train", "trap 'echo > saved; exit 75' TERM; echo > up; sleep 30 & wait")
    pod(cloud, "install")
    assert pod(cloud, "start").returncode == 0
    homes = [cloud / f"worker-{i}" / "flowgrpo_jax" for i in range(2)]
    for home in homes:
        wait_for(home / "up")
    assert pod(cloud, "stop").returncode == 0
    for home in homes:
        wait_for(home / "train.status")
        assert (home / "saved").exists() and (home / "train.status").read_text() == "75\n"


watches = []


def watch(folder, **more):
    watching = subprocess.Popen(
        [LAUNCH / "tpu_pod.sh", "watch", "--config", "c.py"],
        cwd=folder,
        env=environment(folder, **given(folder), **more),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    watches.append(watching)
    return watching


@pytest.mark.parametrize("status", [0, 1, 75])
def test_the_watch_ends_with_the_run(cloud, status):
    """Not before: neither a worker that does not answer nor gcloud without a connection, nor a
    machine under repair, is the end of it."""
    pod(cloud, "install")
    watching = watch(cloud)
    wait_until(lambda: len(trained(cloud)) == 2)
    for trouble in ("MUTE", "REPAIRING"):
        (cloud / "states").write_text(f"{trouble}\nREADY\n")
        wait_until(lambda: (cloud / "states").read_text() == "READY\n")
    (cloud / "deaf").touch()
    wait_until(lambda: not (cloud / "deaf").exists())
    assert watching.poll() is None
    if status == 75:
        assert pod(cloud, "stop").returncode == 0
    else:
        (cloud / "ends").write_text(str(status))
    out, err = watching.communicate(timeout=60)
    assert watching.returncode == status and f"ended with {status}" in out, err
    assert len(trained(cloud)) == 2
    assert not any(" delete " in line for line in calls(cloud))


def home(folder, worker):
    return folder / f"worker-{worker}" / "flowgrpo_jax"


def reboot(folder, worker, number=signal.SIGTERM):
    """Send it to all of the worker's processes: SIGKILL leaves no trace of them, after SIGTERM they
    say that they have saved."""
    parents = subprocess.run(["ps", "-eo", "pid,ppid"], capture_output=True, text=True).stdout
    parents = [tuple(map(int, line.split())) for line in parents.splitlines()[1:]]
    family = [int((home(folder, worker) / "train.pid").read_text())]
    for process in family:  # the wrapper, run.sh and the program
        family += [child for child, parent in parents if parent == process]
    for process in family:
        with suppress(ProcessLookupError):  # a short sleep of the program
            os.kill(process, number)
    return family[0]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_worker_that_was_started_anew_runs_again(cloud, number):
    """The other worker's run goes on."""
    pod(cloud, "install")
    watching = watch(cloud)
    wait_until(lambda: len(trained(cloud)) == 2)
    before = reboot(cloud, 1, number)
    wait_until(lambda: len(trained(cloud)) == 3)
    assert int((home(cloud, 1) / "train.pid").read_text()) != before
    (cloud / "ends").write_text("0")
    assert watching.wait(60) == 0 and len(trained(cloud)) == 3


def test_a_preempted_run_that_has_saved_is_not_the_end(cloud):
    """Its status is there seconds before the state says so."""
    pod(cloud, "install")
    watching = watch(cloud, SPOT="1")
    wait_until(lambda: len(trained(cloud)) == 2)
    for worker in range(2):
        reboot(cloud, worker)
    wait_until(lambda: len(trained(cloud)) == 4)  # all that a watch can know by then
    (cloud / "states").write_text("PREEMPTED\nREADY\n")
    wait_until(lambda: any("queued-resources create pod" in line for line in calls(cloud)))
    (cloud / "ends").write_text("0")
    assert watching.wait(60) == 0


@pytest.mark.parametrize("status", [0, 1, 75])
def test_a_watch_starts_what_has_ended_before_it(cloud, status):
    """To be prolonged, with its error mended, or after `stop`. One worker hears of it later."""
    pod(cloud, "install")
    pod(cloud, "start")
    wait_until(lambda: len(trained(cloud)) == 2)
    if status == 75:
        pod(cloud, "stop")
    else:
        (cloud / "ends").write_text(str(status))
    for worker in range(2):
        wait_for(home(cloud, worker) / "train.status")
    (cloud / "ends").unlink(missing_ok=True)
    (cloud / "worker-1" / "deaf").touch()
    watching = watch(cloud)
    wait_until(lambda: len(trained(cloud)) == 3)
    (cloud / "worker-1" / "deaf").unlink()
    wait_until(lambda: len(trained(cloud)) == 4)
    (cloud / "ends").write_text("0")
    assert watching.wait(60) == 0 and len(trained(cloud)) == 4


def test_a_watch_waits_for_a_run_that_is_still_being_stopped(cloud):
    saves = "until [[ -e ../../go ]]; do sleep 0.05; done; exit 75"
    train = 'echo "train $*" >> ../../calls; until [[ -s ../../ends ]]; do sleep 0.05; done'
    command(cloud, "train", f"trap '{saves}' TERM; {train}")
    pod(cloud, "install")
    pod(cloud, "start")
    wait_until(lambda: len(trained(cloud)) == 2)
    pod(cloud, "stop")
    watching = watch(cloud)
    seen = len(calls(cloud))
    wait_until(lambda: len(calls(cloud)) > seen + 6)
    assert watching.poll() is None and len(trained(cloud)) == 2
    (cloud / "go").touch()
    wait_until(lambda: len(trained(cloud)) == 4)
    (cloud / "ends").write_text("0")
    assert watching.wait(60) == 0


@pytest.mark.parametrize("status", [1, 2])
@pytest.mark.parametrize("other", ["up", "saved"])
def test_a_worker_that_fails_ends_the_run_on_all(cloud, status, other):
    """It is not there to be joined: the others, waiting for it or with a status of their own, do
    not hide it."""
    pod(cloud, "install")
    watching = watch(cloud)
    wait_until(lambda: len(trained(cloud)) == 2)
    (cloud / "states").write_text("REPAIRING\n")  # while all this happens, nobody looks
    before = len(calls(cloud))
    wait_until(lambda: sum(" describe " in line for line in calls(cloud)[before:]) >= 2)
    if other == "saved":
        reboot(cloud, 0)
        wait_for(home(cloud, 0) / "train.status")
    (home(cloud, 1) / "ends").write_text(str(status))
    wait_for(home(cloud, 1) / "train.status")
    (cloud / "states").write_text("READY\n")
    out, err = watching.communicate(timeout=60)
    assert watching.returncode == status and f"ended with {status}" in out, err
    wait_for(home(cloud, 0) / "train.status")
    assert len(trained(cloud)) == 2


def test_an_installation_that_broke_off_is_repeated(cloud):
    (cloud / "worker-0" / "broken").touch()
    (cloud / "ends").write_text("0")
    assert watch(cloud).wait(60) == 0
    assert not (cloud / "worker-0" / "broken").exists() and len(trained(cloud)) == 2


@pytest.mark.parametrize("first", ["PREEMPTED", "ABSENT", "READY\nPREEMPTED", "CREATING"])
def test_a_spot_slice_that_is_gone_is_made_again(cloud, first):
    """Also before the first start, and though there is no slice to be had for a while: one request
    is refused, one fails in the queue. One that is being made is waited for."""
    (cloud / "states").write_text(f"{first}\nABSENT\nREADY\n")
    (cloud / "refusals").write_text("no capacity\n")
    (cloud / "queue").write_text("FAILED\n")
    (cloud / "ends").write_text("0")
    out, err = watch(cloud, SPOT="1").communicate(timeout=60)
    assert "the run has ended with 0" in out, err
    created = [line for line in calls(cloud) if "queued-resources create pod" in line]
    assert len(created) >= 2 and all(line.endswith("--spot") for line in created)
    assert len(trained(cloud)) == 2  # workers without an installation get one


def test_a_queued_resource_need_not_be_spot(cloud):
    assert pod(cloud, "create", QUEUED="1").returncode == 0
    (created,) = (line for line in calls(cloud) if "queued-resources create pod" in line)
    assert "--spot" not in created


def test_an_unknown_command_is_an_error(tmp_path):
    result = pod(tmp_path, "fly")
    assert result.returncode == 2 and "no command fly" in result.stderr


@pytest.mark.parametrize("script", sorted(LAUNCH.glob("*.sh")), ids=lambda p: p.name)
def test_shellcheck(script):
    checker = shutil.which("shellcheck") or Path(sys.executable).with_name("shellcheck")
    if not Path(checker).exists():
        pytest.skip("shellcheck is not installed")
    result = subprocess.run([checker, script], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("file", ["tpu.yaml", "gpu.yaml"])
def test_a_jobset_is_whole(file):
    """What Kubernetes and our own code ask for: as many pods as processes, devices, a grace."""
    yaml = pytest.importorskip("yaml")
    jobset = yaml.safe_load((LAUNCH / "kubernetes" / file).read_text())
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (job,) = jobset["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    assert spec["parallelism"] == spec["completions"] and spec["backoffLimit"] == 0
    pod = spec["template"]["spec"]
    assert pod["restartPolicy"] == "Never" and pod["terminationGracePeriodSeconds"] >= 60
    (container,) = pod["containers"]
    assert "--workdir" in container["args"] and "limits" in container["resources"]
    variables = {v["name"]: v.get("value") for v in container["env"]}
    if "FLOWGRPO_PROCESSES" in variables:
        assert int(variables["FLOWGRPO_PROCESSES"]) == spec["completions"]
        name = f"{jobset['metadata']['name']}-{job['name']}-0-0.{jobset['metadata']['name']}:"
        assert variables["FLOWGRPO_COORDINATOR"].startswith(name)


@pytest.mark.parametrize("file", ["tpu.yaml", "gpu.yaml"])
def test_kubernetes_accepts_the_jobs(file):
    """Strictly: a field that Kubernetes does not know is an error. JobSet's own few fields are not
    in the schema."""
    yaml = pytest.importorskip("yaml")
    validator = pytest.importorskip("kubernetes_validate")
    jobset = yaml.safe_load((LAUNCH / "kubernetes" / file).read_text())
    assert set(jobset["spec"]) <= {"network", "failurePolicy", "replicatedJobs"}
    (rule,) = jobset["spec"]["failurePolicy"]["rules"]
    assert rule == {"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
    for job in jobset["spec"]["replicatedJobs"]:
        whole = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": job["name"]}}
        validator.validate(whole | job["template"], "1.31", strict=True)
        with pytest.raises(validator.ValidationError):
            validator.validate(whole | {"spec": {"parallelsm": 4}}, "1.31", strict=True)


def test_the_dockerfile():
    checker = Path(sys.executable).with_name("hadolint")
    if not checker.exists():
        pytest.skip("hadolint is not installed")
    # Versions of packages are the recipe's matter, not the container's.
    ignored = ["--ignore=DL3008", "--ignore=DL3013"]
    file = LAUNCH / "kubernetes" / "Dockerfile"
    result = subprocess.run([checker, *ignored, file], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def test_the_extras_exist():
    """Those that the launchers install by themselves, and those that their README names."""
    setup = configparser.ConfigParser()
    setup.read(LAUNCH.parent / "setup.cfg")
    docker = (LAUNCH / "kubernetes" / "Dockerfile").read_text()
    texts = [docker, *(file.read_text() for file in LAUNCH.rglob("*.*"))]
    found = re.findall(r"EXTRAS(?:=|:-)([a-z,]+)", "\n".join(texts))
    assert {"cuda", "tpu", "torch"} <= {name for names in found for name in names.split(",")}
    assert {name for names in found for name in names.split(",")} <= set(
        setup["options.extras_require"]
    )


def test_the_time_to_save_is_the_one_that_is_promised():
    promised = re.search(r"(\d+) s for it", (LAUNCH / "README.md").read_text())[1]
    assert f"--signal=TERM@{promised}\n" in (LAUNCH / "slurm.sh").read_text()
    for file in ("tpu.yaml", "gpu.yaml"):
        text = (LAUNCH / "kubernetes" / file).read_text()
        assert f"terminationGracePeriodSeconds: {promised}" in text
