"""The launchers, run here on stand-ins for the programs that they call on clusters."""

import os
import shutil
import signal
import subprocess
import sys
import time
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


# A run that ends as the file `ends` says, one exit status a line, and leaves a checkpoint.
TRAIN = """
echo "$@" >> calls
mkdir -p runs/x/checkpoints/1
status=$(head -n 1 ends); sed -i 1d ends
exit "${status:-0}"
"""


def test_a_run_is_started_again_until_it_is_done(tmp_path):
    command(tmp_path, "train", TRAIN)
    (tmp_path / "ends").write_text("75\n134\n137\n0\n0\n")
    result = call(tmp_path, "run.sh", "train", "--workdir", "runs/x")
    assert result.returncode == 0, result.stderr
    assert calls(tmp_path) == ["--workdir runs/x"] + 3 * ["--workdir runs/x --resume"]
    assert result.stderr.count("launch/run.sh: ended with") == 3


@pytest.mark.parametrize("status", [1, 2])
def test_an_error_is_not_repeated(tmp_path, status):
    command(tmp_path, "train", TRAIN)
    (tmp_path / "ends").write_text(f"{status}\n")
    result = call(tmp_path, "run.sh", "train", "--workdir=runs/x")
    assert result.returncode == status and len(calls(tmp_path)) == 1


def test_restarts_are_bounded_and_need_a_workdir(tmp_path):
    command(tmp_path, "train", TRAIN)
    (tmp_path / "ends").write_text("75\n" * 9)
    assert call(tmp_path, "run.sh", "train", "--workdir=runs/x", RESTARTS="2").returncode == 75
    assert len(calls(tmp_path)) == 3
    result = call(tmp_path, "run.sh", "train")
    assert result.returncode == 2 and "give --workdir" in result.stderr


def test_sigterm_reaches_the_run_and_ends_the_launcher(tmp_path):
    command(
        tmp_path, "train", "trap 'echo saved > saved; exit 75' TERM; echo > up; sleep 30 & wait"
    )
    process = subprocess.Popen(
        [LAUNCH / "run.sh", "train", "--workdir", "runs/x"],
        cwd=tmp_path,
        env=environment(tmp_path),
    )
    while not (tmp_path / "up").exists():
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 75 and (tmp_path / "saved").exists()


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
        f"{host} {i}/3 one:8476 -m flowgrpo_jax.train --config a b.py --workdir /tmp/none"
        for i, host in enumerate(["one", "two", "three"])
    )


def test_ssh_fails_when_one_host_fails(tmp_path):
    command(tmp_path, "ssh", SSH)
    command(tmp_path, "python", '[[ $HOST == one ]] && exit 1; echo > "up-$HOST"; exec sleep 5')
    shutil.copytree(LAUNCH, tmp_path / "launch")
    result = call(tmp_path, "ssh.sh", "--workdir", "/tmp/none", HOSTS="one two")
    assert result.returncode != 0 and "[one]" in result.stdout


def test_slurm_puts_a_saved_run_back_into_the_queue(tmp_path):
    command(tmp_path, "scontrol", 'echo "scontrol $*" >> calls')
    for status, expected in ((75, ["srun", "scontrol requeue 42"]), (0, ["srun"]), (1, ["srun"])):
        (tmp_path / "calls").unlink(missing_ok=True)
        command(tmp_path, "srun", f'echo srun >> calls; echo "$*" > line; exit {status}')
        result = call(tmp_path, "slurm.sh", "--workdir", "w", SLURM_JOB_ID="42")
        assert result.returncode == status and calls(tmp_path) == expected
    line = (tmp_path / "line").read_text()
    assert "launch/run.sh python -m flowgrpo_jax.train --workdir w" in line


GCLOUD = """
echo "$@" >> calls
case "$*" in
  *" describe "*) if [[ -e gone ]]; then echo PREEMPTED; rm gone; else echo READY; fi ;;
  *pgrep*) [[ -e ended ]] ;;
esac
"""


def pod(folder, *arguments, **more):
    given = {"NAME": "pod", "ZONE": "z", "TYPE": "v6e-64", "PAUSE": "0.05", "REPOSITORY": "here"}
    return call(folder, "tpu_pod.sh", *arguments, **given, **more)


def test_a_pod_is_made_installed_and_started(tmp_path):
    command(tmp_path, "gcloud", GCLOUD)
    for step in (
        ("create",),
        ("install",),
        ("start", "--config", "a b.py"),
        ("stop",),
        ("delete",),
    ):
        result = pod(tmp_path, *step, REVISION="abc")
        assert result.returncode == 0, result.stderr
    lines = "\n".join(calls(tmp_path))
    assert "tpu-vm create pod --zone z --accelerator-type v6e-64" in lines
    assert "git checkout -q abc" in lines and "jax[tpu]" in lines
    assert r"launch/run.sh .venv/bin/python -m flowgrpo_jax.train --config a\ b.py" in lines
    assert "pkill -TERM" in lines and "tpu-vm delete pod" in lines
    assert lines.count("--worker=all") == 3


def test_a_spot_slice_that_is_gone_is_made_again(tmp_path):
    """The first look finds it preempted, after the restart the run has ended by itself."""
    command(tmp_path, "gcloud", GCLOUD.replace("echo READY", "echo READY; sleep 0"))
    (tmp_path / "gone").touch()
    result = pod(tmp_path, "watch", "--config", "c.py", SPOT="1")
    assert result.returncode == 0 and "the run has ended" in result.stdout, result.stderr
    lines = calls(tmp_path)
    assert any("queued-resources create pod" in line and "--spot" in line for line in lines)
    assert sum("flowgrpo_jax.train --config c.py" in line for line in lines) == 1


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
