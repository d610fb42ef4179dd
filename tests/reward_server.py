"""The reward server as a process of its own, with a reward that does what a prompt says."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from http_stub import free_port

from flowgrpo_jax.transport import http_client, wire_format

ROOT = Path(__file__).parent.parent
SECRET = "open sesame"
# The reward does what an image's prompt says; the server announces itself by its label.
REWARD = """
import time
import numpy as np

def make(label=0, loading=0.0):
    time.sleep(loading)

    def reward(images, prompts, metadata):
        prompts = list(prompts)
        if "slow" in prompts:
            time.sleep(0.8)
        if "raise" in prompts:
            raise RuntimeError("out of memory")
        if "shape" in prompts:
            return np.zeros(1), np.ones(1, bool)
        scores = {"label": label, "batch": len(images), "nan": np.nan, "invalid": 5.0}
        means = images.mean((1, 2, 3)) + [record.get("bonus", 0) for record in metadata]
        scores = [scores.get(p, m) for p, m in zip(prompts, means)]
        return np.array(scores), np.array([p != "invalid" for p in prompts])

    return reward
"""
SERVER = """
import sys
from flowgrpo_jax import rewards
from flowgrpo_jax import serve
rewards.TABLE["obedient"] = "obedient:make()"
serve.main(sys.argv[1:])
"""
LIMITS = wire_format.Limits(images=32, side=2048, bytes=1_000_000)


class Server:
    """A server process on a port of its own, which can be killed and started again."""

    def __init__(self, folder, **options):
        self.folder, self.options, self.port = folder, options, free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        (folder / "obedient.py").write_text(REWARD)

    def start(self):
        arguments = ["--reward", "obedient", "--options", json.dumps(self.options)]
        arguments += ["--port", str(self.port), "--secret_env", "TEST_SECRET"]
        arguments += ["--max_bytes", "1000000", "--max_images", "32", "--batch", "32"]
        path = os.pathsep.join([str(ROOT), str(self.folder)])
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER, *arguments],
            env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": path, "TEST_SECRET": SECRET},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def wait(self, path):
        """Until GET path is 200; the statuses and times to connect before that."""
        before = []
        for _ in range(600):
            if self.process.poll() is not None:
                pytest.fail(f"the server ended: {self.process.stdout.read()}")
            try:
                http_client.request(self.url + path, timeout=5)
                return before
            except http_client.Failed as error:
                before.append(type(error))
                time.sleep(0.05)
        pytest.fail(f"no server: {before[-1]}")

    def kill(self, kind=signal.SIGKILL):
        self.process.send_signal(kind)
        return self.process.communicate(timeout=20)[0]


def pictures(n, side=8, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, side, side, 3), dtype=np.uint8)
