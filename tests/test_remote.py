"""The reward server and its client: slow, failing, killed in the middle of a request, back again;
wrong secrets, wrong options, and requests that are too large or no requests at all."""

import json
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from http_stub import Stub, nobody
from malformed import MALFORMED
from reward_server import SECRET, Server, pictures

from flowgrpo_jax import rewards, serve
from flowgrpo_jax.transport import http_client, wire_format
from flowgrpo_jax.types import scope_of


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


# ------------------------------------------------------------------------------------ a good server


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


# -------------------------------------------------------------------------------------- bad rewards


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


# ------------------------------------------------------------------------------- dying, coming back


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


# ------------------------------------------------------------------------------ secrets and options


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


# ------------------------------------------------------------------------- too large, and malformed


def test_a_request_that_is_too_large_is_refused_and_read_no_further(servers):
    url = servers[0].url
    with pytest.raises(http_client.Refused, match=r"413.*1000000 bytes"):
        post(url, b"x" * 1_000_001)
    with pytest.raises(
        http_client.Failed
    ):  # 413, or the connection is cut while this is still being sent
        post(url, b"x" * 20_000_000)
    assert json.loads(post(url, request()))["valid"] == [True]


def test_the_server_says_what_is_wrong_and_goes_on(servers):
    for name in ("no JSON", "an object", "half a PNG", "metadata", "depth"):
        body, words = MALFORMED[name]
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        with pytest.raises(http_client.Refused, match=f"answered 400.*{words}"):
            post(servers[0].url, body)
    assert json.loads(post(servers[0].url, request()))["scores"] == [1]
    with pytest.raises(http_client.Refused, match="405"):
        http_client.request(servers[0].url + "/score", timeout=5)
