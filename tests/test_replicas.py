"""Retries of a request and the replicas that share it, which fail, hang, rest and come back."""

from types import SimpleNamespace

import pytest
from http_stub import Stub, always, nobody, refused

from flowgrpo_jax.transport import http_client


class Servers:
    """Servers that hang or answer on a clock of their own, on which a hang takes its time limit."""

    def __init__(self, monkeypatch):
        self.now, self.hung, self.seen = 100.0, set(), []
        clock = SimpleNamespace(monotonic=lambda: self.now, sleep=self.wait)
        monkeypatch.setattr(http_client, "time", clock)
        monkeypatch.setattr(http_client, "request", self.request)

    def wait(self, seconds):
        self.now += seconds

    def request(self, url, body, headers, *, timeout):
        self.seen.append(url.removesuffix("/"))
        if self.seen[-1] in self.hung:
            self.wait(timeout)
            raise http_client.Unreachable(f"{url}: timed out")
        return self.seen[-1].encode()


@pytest.fixture
def servers(monkeypatch):
    return Servers(monkeypatch)


def failing(times, status=500):
    """An answer that fails a few times first."""
    left = [status] * times
    return lambda request, body: (left.pop() if left else 200, b"good")


def test_a_passing_failure_is_tried_again():
    with Stub(failing(2)) as stub:
        assert http_client.Replicas(stub.url, retries=2, backoff=0).post("/", b"") == b"good"
        assert len(stub.seen) == 3


def test_tries_are_bounded_and_the_waits_double(monkeypatch):
    waits = []
    monkeypatch.setattr(http_client.time, "sleep", waits.append)
    with Stub(always(500, b"broken")) as stub:
        replicas = http_client.Replicas(stub.url, retries=3, backoff=0.5)
        error = refused(replicas.post, "/", b"")
        assert len(stub.seen) == 4 and waits == [0.5, 1.0, 2.0]
        assert "after 4 tries" in str(error) and "broken" in str(error)
        refused(replicas.post, "/", b"")  # a server that answers is not given up
        assert len(stub.seen) == 8


def test_a_refusal_is_final():
    with Stub(always(401)) as one, Stub(always(200)) as other:
        replicas = http_client.Replicas([one.url, other.url], backoff=0)
        error = refused(replicas.post, "/", b"")
    assert type(error) is http_client.Refused and len(one.seen) == 1 and not other.seen


def test_replicas_share_the_work():
    with Stub(always(200, b"1")) as one, Stub(always(200, b"2")) as two:
        replicas = http_client.Replicas([one.url + "/", two.url])
        assert b"".join(replicas.post("/x", b"") for _ in range(6)) == b"121212"
        assert {path for _, path, _, _ in one.seen} == {"/x"}


def test_another_replica_takes_over_and_the_hung_one_rests_until_it_is_back(servers, monkeypatch):
    monkeypatch.setattr(http_client, "RESTS", 1.0)
    servers.hung = {"http://1"}
    replicas = http_client.Replicas(["http://1", "http://2"], timeout=0.4, retries=0, rest=0.6)
    assert {replicas.post("/", b"") for _ in range(4)} == {b"http://2"}
    assert servers.seen.count("http://1") == 1
    servers.hung = set()
    servers.wait(0.59)
    assert {replicas.post("/", b"") for _ in range(2)} == {b"http://2"}
    servers.wait(0.02)
    assert {replicas.post("/", b"") for _ in range(2)} == {b"http://1", b"http://2"}


def test_a_replica_that_hangs_costs_a_tenth_of_the_time_at_most(servers, caplog):
    """Not its whole time limit every few requests, for ever; and it does not go unsaid."""
    servers.hung = {"http://1"}
    replicas = http_client.Replicas(["http://1", "http://2"], timeout=20, retries=0, rest=0.1)
    begun = servers.now
    for _ in range(1000):
        assert replicas.post("/", b"") == b"http://2"
        servers.wait(1.0)
    lost = 20 * servers.seen.count("http://1")
    assert 0 < lost <= (servers.now - begun) / 10 and "asked last until it answers" in caplog.text
    servers.hung = set()
    servers.wait(200.0)
    assert {replicas.post("/", b"") for _ in range(2)} == {b"http://1", b"http://2"}
    assert "http://1 is back" in caplog.text


def test_when_nobody_is_there_the_next_requests_fail_at_once_and_later_ones_try_again(servers):
    servers.hung = {"http://1"}
    replicas = http_client.Replicas("http://1", timeout=20, retries=1, backoff=0, rest=50)
    refused(replicas.post, "/", b"")
    assert (servers.now, len(servers.seen)) == (140.0, 2)
    assert "given up" in str(refused(replicas.post, "/", b""))
    assert (servers.now, len(servers.seen)) == (140.0, 2)
    servers.hung = set()
    servers.wait(51)
    assert replicas.post("/", b"") == b"http://1"


def test_a_check_needs_one_good_replica_and_names_the_bad_ones(caplog):
    def probe(url):
        http_client.request(url, timeout=5)

    with Stub(always(200)) as good, Stub(always(503, b"loading")) as bad:
        http_client.Replicas([good.url, bad.url]).check("the reward", probe)
        assert f"{bad.url} answered 503: loading" in caplog.text
        gone = nobody()
        with pytest.raises(RuntimeError, match="the reward: no server is ready") as error:
            http_client.Replicas([gone, bad.url]).check("the reward", probe)
    assert gone in str(error.value) and "loading" in str(error.value)


def test_a_check_waits_for_a_server_that_is_loading_and_for_no_other(monkeypatch):
    """Trainer and server may have been started together."""

    def probe(url):
        http_client.request(url, timeout=5)

    monkeypatch.setattr(http_client, "PATIENCE", 0.5)
    with Stub(failing(1, 503)) as loading:
        http_client.Replicas(loading.url).check("the reward", probe)
        assert len(loading.seen) == 2
    monkeypatch.setattr(http_client, "PATIENCE", 60.0)
    with Stub(always(401, b"a wrong secret")) as stub, pytest.raises(RuntimeError, match="a wrong"):
        http_client.Replicas(stub.url).check("the reward", probe)
    assert len(stub.seen) == 1


@pytest.mark.parametrize(
    "urls, options, words",
    [
        ([], {}, "urls is empty"),
        ("file:///etc/passwd", {}, "http://"),
        (["http://a", "b:80"], {}, "'b:80' must start with http"),
        ("http://a", {"timeout": 0}, "timeout=0 must be above 0"),
        ("http://a", {"retries": -1}, "retries=-1"),
    ],
)
def test_options_that_cannot_be(urls, options, words):
    with pytest.raises(ValueError, match=words):
        http_client.Replicas(urls, **options)
