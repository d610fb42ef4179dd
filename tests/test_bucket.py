"""A run whose work directory is a bucket, of an emulator of Google Cloud Storage."""

from http.server import ThreadingHTTPServer

import jax
import numpy as np
import processes
import pytest
from etils import epath
from PIL import Image
from processes import final_state, outcome, start

from flowgrpo_jax import cli, files
from flowgrpo_jax.checkpoint import Checkpoints

pytest.importorskip("gcsfs")
emulator = pytest.importorskip("gcp_storage_emulator.server")
folder, table = processes.folder, processes.table
nothing_goes_on = processes.nothing_goes_on


@pytest.fixture(scope="module")
def bucket():
    """Its address; etils, tensorboardX and TensorStore find the emulator by the environment."""
    # One thread would wait for ever on a connection that a process keeps open.
    emulator.server.HTTPServer = ThreadingHTTPServer
    server = emulator.create_server("127.0.0.1", 0, in_memory=True, default_bucket="bucket")
    server.start()
    host = "http://{}:{}".format(*server._api._httpd.server_address)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STORAGE_EMULATOR_HOST", host)
        patch.setenv("TENSORSTORE_GCS_HTTP_URL", host)
        patch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "anyone")
        yield epath.Path("gs://bucket")
    server.stop()


def test_a_run_in_a_bucket_goes_on_bit_for_bit(folder, bucket):
    """An epoch, and a second one after a restart."""
    start(folder, "local", {"data": 1}, devices=1)
    name = str(bucket / "runs" / "away")
    for epochs in (1, 2):
        start(folder, name, {"data": 1}, devices=1, epochs=epochs)
    assert outcome(folder, name)[0] == outcome(folder, "local")[0]
    jax.tree.map(
        np.testing.assert_array_equal, final_state(folder, name), final_state(folder, "local")
    )
    workdir = epath.Path(name)
    assert Checkpoints(workdir / "checkpoints").steps() == [1, 2]
    with (workdir / "samples" / "epoch-00002.png").open("rb") as file:
        assert Image.open(file).size[0] > 64
    assert not (folder / "gs:").exists()


def test_a_missing_bucket_is_an_error_at_once(bucket):
    with pytest.raises(OSError, match=r"nothing can be written to gs://nobodys/run.*exists"):
        cli.prepare(epath.Path("gs://nobodys/run"), resume=False)


def test_a_path_from_the_root(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert files.absolute("gs://bucket/run") == epath.Path("gs://bucket/run")
    assert files.absolute("run") == epath.Path(tmp_path / "run")
