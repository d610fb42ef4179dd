"""The reward server as a process of its own, and its client: slow, failing, killed in the middle of
a request, back again; wrong secrets, and requests that are too large or no requests at all."""

import asyncio
import base64
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from http_stub import Stub, free_port, nobody
from PIL import Image

from flowgrpo_jax import rewards, serve
from flowgrpo_jax.transport import http_client, wire_format, worker
from flowgrpo_jax.types import GraphReward, scope_of

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


@pytest.fixture(scope="module")
def servers(tmp_path_factory):
    """Two replicas, labelled 1 and 2."""
    pytest.importorskip("starlette")
    pytest.importorskip("uvicorn")
    both = [
        Server(tmp_path_factory.mktemp(f"server{label}"), label=label, loading=0.7)
        for label in (1, 2)
    ]
    for server in both:
        server.start()
    for server in both:
        server.wait("/health")
    assert http_client.Unavailable in both[1].wait(
        "/ready"
    )  # alive, and answers that it is not ready yet
    both[0].wait("/ready")
    yield both
    for server in both:
        server.kill()


@pytest.fixture
def remote(servers, monkeypatch):
    """Makes clients that know the secret."""
    monkeypatch.setenv("TEST_SECRET", SECRET)

    def make(*urls, **options):
        options = {
            "secret_env": "TEST_SECRET",
            "timeout": 10,
            "backoff": 0.01,
            "batch": 32,
        } | options
        urls = urls or [server.url for server in servers]
        return rewards.load(["remote"], {"remote": {"urls": urls, **options}})["remote"]

    return make


def pictures(n, side=8, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, side, side, 3), dtype=np.uint8)


# ------------------------------------------------------------------------------ a good server


@pytest.mark.parametrize("form", ["png", "npy"])
def test_scores_come_back_in_order_from_pictures_prompts_and_metadata(remote, form):
    images = pictures(21)
    metadata = [{"bonus": 1000 * i, "tag": "é"} for i in range(21)]
    reward = remote(batch=4, form=form)
    reward.ready()
    scores, valid = reward(images, ["mean"] * 21, metadata)
    assert valid.all() and valid.dtype == bool and scores.dtype == np.float32
    expected = images.reshape(21, -1).mean(1) + 1000 * np.arange(21)
    np.testing.assert_allclose(scores, expected, rtol=1e-6)


def test_validity_comes_back_and_numbers_that_are_none_are_invalid(remote):
    scores, valid = remote()(pictures(4), ["mean", "invalid", "nan", "label"], [{}] * 4)
    np.testing.assert_array_equal(valid, [True, False, False, True])
    np.testing.assert_array_equal(scores[[1, 2]], 0)


def test_replicas_share_the_batches(remote):
    scores, valid = remote(batch=2)(pictures(8), ["label"] * 8, [{}] * 8)
    assert valid.all() and sorted(scores) == [1] * 4 + [2] * 4


def test_requests_that_wait_are_scored_together(remote, servers):
    """While one request is being scored, others gather; none is split."""
    reward = remote(servers[0].url)
    ask = lambda prompts: reward(pictures(len(prompts)), prompts, [{}] * len(prompts))  # noqa: E731
    with ThreadPoolExecutor(8) as pool:
        first = pool.submit(ask, ["slow", "batch"])
        time.sleep(0.3)
        rest = [pool.submit(ask, ["batch"] * 3) for _ in range(5)]
        whole = pool.submit(ask, ["batch"] * 32)
        sizes = [float(f.result()[0][-1]) for f in [first, *rest, whole]]
    assert sizes[0] == 2 and sizes[-1] == 32
    assert max(sizes[1:-1]) > 3


# --------------------------------------------------------------------------------- bad rewards


def test_a_reward_that_raises_costs_only_its_request(remote, servers, caplog):
    scores, valid = remote(batch=2, retries=1)(
        pictures(6), ["label", "label", "raise", "label", "label", "shape"], [{}] * 6
    )
    np.testing.assert_array_equal(valid, [True, True, False, False, False, False])
    assert "out of memory" in caplog.text and "returned shapes" in caplog.text
    assert set(scores[:2]) <= {1, 2}


def test_a_request_that_fails_does_not_spoil_those_that_are_scored_with_it(remote, servers):
    reward = remote(servers[0].url, retries=0)
    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(reward, pictures(1), ["slow"], [{}])
        time.sleep(0.3)
        bad = pool.submit(reward, pictures(1), ["raise"], [{}])
        good = pool.submit(reward, pictures(1), ["label"], [{}])
        assert first.result()[1].all() and not bad.result()[1].any()
        assert good.result()[0][0] == 1 and good.result()[1].all()


def test_a_slow_reward_is_given_up_in_time(remote):
    _, valid = remote(timeout=0.2, retries=0)(pictures(1), ["slow"], [{}])
    assert not valid.any()


# ------------------------------------------------------------------------- dying, coming back


def test_a_server_dies_in_the_middle_of_a_request_and_comes_back(remote, servers, monkeypatch):
    monkeypatch.setattr(http_client, "RESTS", 0.0)
    one, two = servers
    reward = remote(one.url, two.url, rest=0.3)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(reward, pictures(2), ["slow", "label"], [{}] * 2)
        time.sleep(0.3)
        one.kill()
        scores, valid = waiting.result()
    assert valid.all() and scores[1] == 2  # the other one took over
    reward.ready()  # one is enough
    with pytest.raises(RuntimeError, match="no server is ready"):
        remote(one.url).ready()
    alone = remote(one.url, retries=1, rest=0.3)
    assert not alone(pictures(1), ["label"], [{}])[1].any()

    one.start()
    one.wait("/ready")
    time.sleep(0.3)  # longer than the rest
    scores, valid = alone(pictures(1), ["label"], [{}])
    assert valid.all() and scores[0] == 1
    scores, _ = reward(pictures(2), ["label"] * 2, [{}] * 2)
    assert {float(reward(pictures(1), ["label"], [{}])[0][0]) for _ in range(2)} == {1, 2}


def test_a_reward_that_cannot_be_loaded_ends_the_server(tmp_path):
    pytest.importorskip("uvicorn")
    server = Server(tmp_path, lable=1)
    server.start()
    out, _ = server.process.communicate(timeout=60)
    assert server.process.returncode != 0 and "unexpected keyword argument 'lable'" in out


# ------------------------------------------------------------------------------------ secrets


def post(url, body, secret=SECRET):
    headers = {"Authorization": f"Bearer {secret}"} if secret else {}
    return http_client.request(url + "/score", body, headers, timeout=10)


def request(n=1, **changes):
    body = json.loads(wire_format.encode(pictures(n), ["label"] * n, [{}] * n))
    return json.dumps(body | changes).encode()


@pytest.mark.parametrize("secret", [None, "", "open", "open sesam", "open sesame!", "öpen sesame"])
def test_without_the_secret_there_is_no_score(servers, secret):
    url = servers[0].url
    if secret == "öpen sesame":
        secret = secret.encode().decode("latin-1")
    with pytest.raises(http_client.Refused, match=r"401.*the secret is missing or wrong"):
        post(url, request(), secret)
    assert json.loads(post(url, request()))["valid"] == [True]


def test_a_wrong_secret_is_found_before_training_starts(remote, monkeypatch):
    monkeypatch.setenv("OTHER", "guess")
    for options in ({"secret_env": "OTHER"}, {"secret_env": None}):
        with pytest.raises(RuntimeError, match="wants another secret: check secret_env"):
            remote(**options).ready()
    _, valid = remote(secret_env="OTHER")(pictures(1), ["label"], [{}])
    assert not valid.any()


def test_a_batch_that_the_server_does_not_take_is_found_before_training_starts(remote):
    with pytest.raises(RuntimeError, match="takes 32 images a request, but batch=33"):
        remote(batch=33).ready()


def test_another_scope_than_the_server_s_is_found_before_training_starts(remote):
    with pytest.raises(RuntimeError, match=r"set scope='image' in reward\.options"):
        remote(scope="group").ready()
    state = {"reward": "preference", "scope": "group", "authorised": True, "limits": {"images": 64}}
    with Stub(lambda request, body: (200, json.dumps(state).encode())) as stub:
        remote(stub.url, scope="group").ready()
        with pytest.raises(RuntimeError, match=r"set scope='group' in reward\.options"):
            remote(stub.url).ready()
    with pytest.raises(ValueError, match="scope='prompt' must be one of image, group, epoch"):
        remote(scope="prompt")


@pytest.mark.parametrize("scope, sizes", [("image", [3, 3, 1]), ("group", [7]), ("epoch", [7])])
def test_a_group_is_one_request(scope, sizes):
    """Whatever the largest batch is."""

    def answer(request, body):
        n = len(json.loads(body)["prompts"])
        return 200, json.dumps({"scores": [n] * n, "valid": [True] * n}).encode()

    with Stub(answer) as stub:
        options = {"urls": stub.url, "scope": scope, "batch": 3}
        reward = rewards.load(["remote"], {"remote": options})["remote"]
        scores, valid = reward(pictures(7), ["a"] * 7, [{}] * 7)
    assert scope_of(reward) == scope and valid.all()
    assert scores.tolist() == [n for n in sizes for _ in range(n)]


def test_ready_without_a_reward_server(remote):
    with pytest.raises(RuntimeError, match="no server is ready"):
        remote(nobody()).ready()
    with (
        Stub(lambda request, body: (200, b'{"hello": 1}')) as stub,
        pytest.raises(RuntimeError, match="is no flowgrpo_jax reward server"),
    ):
        remote(stub.url).ready()


@pytest.mark.parametrize("arguments", [["--host", "0.0.0.0"], ["--secret_env", "TEST_NOT_SET"]])
def test_a_server_open_to_all_is_refused(arguments):
    pytest.importorskip("uvicorn")
    with pytest.raises(SystemExit, match="secret_env"):
        serve.main(["--reward", "ocr", *arguments])


@pytest.mark.parametrize(
    "options, words", [({"form": "jpeg"}, "form='jpeg'"), ({"batch": 0}, "batch=0")]
)
def test_options_that_cannot_be(options, words):
    with pytest.raises(ValueError, match=words):
        rewards.load(["remote"], {"remote": {"urls": "http://a", **options}})


# ------------------------------------------------------------------- too large, and malformed


def test_a_request_that_is_too_large_is_refused_and_read_no_further(servers):
    url = servers[0].url
    with pytest.raises(http_client.Refused, match=r"413.*1000000 bytes"):
        post(url, b"x" * 1_000_001)
    with pytest.raises(
        http_client.Failed
    ):  # 413, or the connection is cut while this is still being sent
        post(url, b"x" * 20_000_000)
    assert json.loads(post(url, request()))["valid"] == [True]


def coded(data):
    return base64.b64encode(data).decode()


def file(shape=(8, 8, 3), kind="PNG", mode="RGB"):
    buffer = io.BytesIO()
    Image.fromarray(np.zeros(shape, np.uint8)).convert(mode).save(buffer, format=kind)
    return buffer.getvalue()


def npy(array, allow_pickle=False):
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=allow_pickle)
    return buffer.getvalue()


class Bomb:
    """Its pickle makes a folder where it is read."""

    def __reduce__(self):
        return os.mkdir, ("/tmp/a-pickle-was-read",)


def promising(shape):
    """An npy header of this shape, and hardly any data."""
    buffer = io.BytesIO()
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(buffer, header)
    return buffer.getvalue() + b"\0" * 10


ONE = {"prompts": [""], "metadata": [{}]}
MALFORMED = {
    "nothing": (b"", "no JSON"),
    "no JSON": (b"\x80\x04}.", "no JSON"),
    "depth": (b"[" * 100_000, "no JSON"),
    "a list": (b"[]", "must be an object, not list"),
    "no images": (ONE, "images must be an object"),
    "pickle": (ONE | {"images": {"pickle": "gAR9lC4="}}, "one of the keys png, npy"),
    "both": (ONE | {"images": {"png": [], "npy": ""}}, "one of the keys"),
    "no list": (ONE | {"images": {"png": "abc"}}, "must be a list"),
    "zero": ({"images": {"png": []}, "prompts": [], "metadata": []}, "0 images"),
    "numbers": (ONE | {"images": {"png": [5]}}, "base64 strings"),
    "no base64": (ONE | {"images": {"png": ["%%%"]}}, "no PNG"),
    "a JPEG": (ONE | {"images": {"png": [coded(file(kind="JPEG"))]}}, "no PNG"),
    "half a PNG": (ONE | {"images": {"png": [coded(file((64, 64, 3))[:50])]}}, "broken PNG"),
    "sizes": (
        ONE | {"images": {"png": [coded(file()), coded(file((9, 8, 3)))]}},
        r"several sizes: \[\(8, 8\), \(8, 9\)\]",
    ),
    "many": (ONE | {"images": {"png": [coded(file())] * 33}}, "33 images"),
    "wide": (ONE | {"images": {"png": [coded(file((1, 2049, 3)))]}}, "1 x 2049 px"),
    "heavy": (ONE | {"images": {"png": [coded(file((600, 600, 3)))]}}, "more than 1000000 bytes"),
    "no prompt": ({"images": {"png": [coded(file())]}, "metadata": [{}]}, "lists of 1 strings"),
    "two prompts": (ONE | {"images": {"png": [coded(file())]}, "prompts": ["", ""]}, "of 1 str"),
    "a number": (ONE | {"images": {"png": [coded(file())]}, "prompts": [1]}, "of 1 strings"),
    "metadata": (ONE | {"images": {"png": [coded(file())]}, "metadata": [1]}, "1 objects"),
    "no npy": (ONE | {"images": {"npy": coded(b"\x93NUMPY")}}, "no array"),
    "an object": (
        ONE | {"images": {"npy": coded(npy(np.array([Bomb()], object), allow_pickle=True))}},
        r"object \(1,\)",
    ),
    "floats": (ONE | {"images": {"npy": coded(npy(np.zeros((1, 8, 8, 3))))}}, "float64"),
    "no batch": (ONE | {"images": {"npy": coded(npy(np.zeros((8, 8, 3), np.uint8)))}}, "uint8"),
    "gray": (ONE | {"images": {"npy": coded(npy(np.zeros((1, 8, 8, 1), np.uint8)))}}, "channels"),
    "gigabytes": (ONE | {"images": {"npy": coded(promising((32, 2048, 2048, 3)))}}, "more than"),
    "exabytes": (ONE | {"images": {"npy": coded(promising((2**40, 2**40, 2**40, 3)))}}, "images"),
    "negative": (ONE | {"images": {"npy": coded(promising((1, -8, -8, 3)))}}, "-8 x -8"),
    "too short": (ONE | {"images": {"npy": coded(promising((1, 8, 8, 3)))}}, "10 bytes"),
}
LIMITS = wire_format.Limits(images=32, side=2048, bytes=1_000_000)


@pytest.mark.parametrize("name", MALFORMED)
def test_what_is_no_request_is_refused_with_a_reason(name):
    body, words = MALFORMED[name]
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    with pytest.raises(ValueError, match=words):
        wire_format.decode(body, LIMITS)
    assert not Path("/tmp/a-pickle-was-read").exists()


def test_the_server_says_what_is_wrong_and_goes_on(servers):
    for name in ("no JSON", "an object", "half a PNG", "metadata", "depth"):
        body, words = MALFORMED[name]
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        with pytest.raises(http_client.Refused, match=f"answered 400.*{words}"):
            post(servers[0].url, body)
    assert json.loads(post(servers[0].url, request()))["scores"] == [1]
    with pytest.raises(http_client.Refused, match="405"):
        http_client.request(servers[0].url + "/score", timeout=5)


def test_pictures_of_other_modes_are_read_as_rgb():
    body = json.dumps(ONE | {"images": {"png": [coded(file(mode="RGBA"))]}}).encode()
    assert wire_format.decode(body, LIMITS)[0].shape == (1, 8, 8, 3)


@pytest.mark.parametrize(
    "answer",
    [
        b"oops",
        b"[]",
        b'{"scores": [1], "valid": [true]}',
        b'{"scores": [1, "2"], "valid": [true, true]}',
        b'{"scores": [1, 2], "valid": [1, 1]}',
        b'{"scores": [1, 2]}',
        b'{"scores": [1, 1%s], "valid": [true, true]}' % (b"0" * 400),
    ],
)
def test_an_answer_that_is_none_makes_its_images_invalid(answer, caplog):
    with Stub(lambda request, body: (200, answer)) as stub:
        reward = rewards.load(["remote"], {"remote": {"urls": stub.url}})["remote"]
        _, valid = reward(pictures(2), ["", ""], [{}, {}])
    assert not valid.any() and "failed on 2 images" in caplog.text


# ----------------------------------------------------------------------- rewards in the graph


def test_a_reward_in_the_graph_is_served_as_well():
    """Of any batch size, of which only few are compiled."""
    traced = []

    def score(weights, images, lengths):
        traced.append(images.shape)
        return images.mean((1, 2, 3)) * weights + lengths

    def prepare(prompts, metadata):
        return np.array([len(p) if p else np.nan for p in prompts], np.float32)

    served = worker.on_host(GraphReward(np.float32(2.0), prepare, score))
    for n in (1, 3, 4, 5, 7, 8):
        images = pictures(n)
        prompts = ["x" * (i % 3) for i in range(n)]
        scores, valid = served(images, prompts, [{}] * n)
        lengths = np.arange(n) % 3
        np.testing.assert_array_equal(valid, lengths > 0)
        expected = 2 * images.reshape(n, -1).mean(1) + lengths
        np.testing.assert_allclose(scores[valid], expected[valid], rtol=1e-5)
    assert {shape[0] for shape in traced} == {1, 4, 8} and len(traced) == 3


@pytest.mark.parametrize("scope, together", [("image", True), ("group", False), ("epoch", False)])
def test_requests_to_a_group_reward_are_scored_one_by_one(scope, together):
    """Two of them may be groups of one prompt, from two epochs or from two runs."""
    started, go, sizes = threading.Event(), threading.Event(), []

    def reward(images, prompts, metadata):
        sizes.append(len(images))
        started.set()
        go.wait(5)
        return np.zeros(len(images)), np.ones(len(images), bool)

    reward.scope = scope
    thread = worker.Worker(lambda: reward, batch=64, waiting=9)
    thread.start()
    first = thread.submit(pictures(1), ["a"], [{}])
    assert started.wait(5)
    rest = [thread.submit(pictures(4), ["a"] * 4, [{}] * 4) for _ in range(2)]
    go.set()
    assert all(future.result(5)[1].all() for future in [first, *rest])
    assert sizes == ([1, 8] if together else [1, 4, 4])
    assert thread.scope == scope


def test_the_worker_refuses_more_than_may_wait():
    started, go = threading.Event(), threading.Event()

    def reward(images, prompts, metadata):
        started.set()
        go.wait(5)
        return np.zeros(len(images)), np.ones(len(images), bool)

    thread = worker.Worker(lambda: reward, batch=1, waiting=2)
    thread.start()
    job = (pictures(1), ["a"], [{}])
    first = thread.submit(*job)
    assert started.wait(5)
    waiting = [thread.submit(*job) for _ in range(2)]
    assert thread.submit(*job) is None
    waiting.pop().cancel()  # whose client has gone: it makes room, and is not scored
    waiting.append(thread.submit(*job))
    go.set()
    assert all(future.result(5)[1].all() for future in [first, *waiting])


def test_a_request_whose_client_has_gone_is_dropped():
    """A client that gave up asks again: scored twice, overload would feed itself."""
    submitted = []

    class Busy:
        ready = True

        def submit(self, *job):
            submitted.append(Future())
            return submitted[-1]

    async def body():
        yield wire_format.encode(pictures(1), ["a"], [{}])

    async def gone():
        return True

    status, _ = asyncio.run(serve._score(body(), Busy(), LIMITS, gone))
    assert status == 503 and submitted[0].cancelled()


def test_integers_for_scores_and_for_booleans_are_served_as_they_are_trained_on():
    def reward(images, prompts, metadata):
        return [1] * len(images), [1] * len(images)

    thread = worker.Worker(lambda: reward, batch=1, waiting=2)
    thread.start()
    answer = wire_format.encode_scores(*thread.submit(pictures(1), ["a"], [{}]).result(5))
    scores, valid = wire_format.decode_scores(answer, 1)
    assert scores.tolist() == [1.0] and valid.tolist() == [True]
