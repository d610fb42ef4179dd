"""The launchers, run here on stand-ins for the programs that they call on clusters."""

import configparser
import os
import re
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


def test_a_signal_between_two_starts_ends_the_launcher(tmp_path):
    command(tmp_path, "train", "echo >> calls; echo > up; exit 134")
    process = launch(tmp_path, "train", PAUSE="30")
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 75 and len(calls(tmp_path)) == 1


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
    assert "git checkout -q abc" in lines and "-e '.[tpu]' gcsfs" in lines
    assert "venv -q --python 3.12" in lines  # the machines' own Python is 3.10
    assert r"launch/run.sh .venv/bin/python -m flowgrpo_jax.train --config a\ b.py" in lines
    assert "FLOWGRPO_POD=1" in lines and "tpu-vm delete pod" in lines
    assert lines.count("--worker=all") == 3


def test_a_pod_gets_the_extras_of_its_recipe(tmp_path):
    command(tmp_path, "gcloud", GCLOUD)
    assert pod(tmp_path, "install", EXTRAS="tpu,torch").returncode == 0
    assert "-e '.[tpu,torch]' gcsfs" in "\n".join(calls(tmp_path))


@pytest.mark.parametrize(
    "step, word, program",
    [
        ("stop", "pkill", "bash launch/run.sh .venv/bin/python -m flowgrpo_jax.train"),
        ("watch", "pgrep", ".venv/bin/python -m flowgrpo_jax.train --config c.py"),
    ],
)
def test_a_search_for_the_run_does_not_find_itself(tmp_path, step, word, program):
    """`pkill -f` and `pgrep -f` look at whole command lines, their own shell's among them."""
    command(tmp_path, "gcloud", GCLOUD)
    assert pod(tmp_path, step, "--config", "c.py").returncode == 0
    (line,) = (line for line in calls(tmp_path) if word in line)
    script = line.partition("--command ")[2]
    pattern = re.search(r"-f '?([^' ]+)", script)[1]
    assert re.search(pattern, program) and not re.search(pattern, script)


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
