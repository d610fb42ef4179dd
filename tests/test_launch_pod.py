"""The launcher of Cloud TPU slices, on a stand-in for gcloud whose workers are folders."""

import os
import shutil
import signal
import subprocess
from contextlib import suppress

import pytest
from launchers import LAUNCH, call, calls, command, environment, wait_for, wait_until

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
    assert watching.wait(300) == 0 and len(trained(cloud)) == 3


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
    assert watching.wait(300) == 0


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
    assert watching.wait(300) == 0 and len(trained(cloud)) == 4


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
    assert watching.wait(300) == 0


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
    assert watch(cloud).wait(300) == 0
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
