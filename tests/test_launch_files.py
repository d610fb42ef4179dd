"""Scripts, JobSets and the container: checked by their own linters, and against each other."""

import configparser
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from launchers import LAUNCH


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
