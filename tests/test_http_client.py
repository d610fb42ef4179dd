"""Requests with a time limit, retries and replicas, against real servers that misbehave."""

import threading
from types import SimpleNamespace

import pytest
from http_stub import Stub, nobody

from flowgrpo_jax.transport import http_client


def always(status, body=b""):
    return lambda request, _: (status, body)


def refused(f, *arguments, **options):
    """What f raised: Failed or one of its kinds."""
    with pytest.raises(http_client.Failed) as caught:
        f(*arguments, **options)
    return caught.value


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


# ------------------------------------------------------------------------------- one request


def test_a_request_and_its_answer():
    with Stub(lambda request, body: (200, body[::-1])) as stub:
        assert http_client.request(stub.url + "/a", b"abc", {"X-Secret": "s"}, timeout=5) == b"cba"
        assert http_client.request(stub.url + "/b", timeout=5) == b""
    (method, path, headers, body), (method2, path2, _, _) = stub.seen
    assert (method, path, body, headers["X-Secret"]) == ("POST", "/a", b"abc", "s")
    assert (method2, path2) == ("GET", "/b")


@pytest.mark.parametrize(
    "status, kind",
    [
        *((status, http_client.Refused) for status in (400, 401, 404, 413)),
        *((status, http_client.Unavailable) for status in (408, 429, 500, 503)),
    ],
)
def test_an_error_is_worth_another_try_or_not(status, kind):
    with Stub(always(status, b"the reason")) as stub:
        error = refused(http_client.request, stub.url, timeout=5)
    assert type(error) is kind and f"{stub.url} answered {status}: the reason" in str(error)


@pytest.fixture
def proxy(monkeypatch):
    """A proxy that the environment names, which refuses whatever it is asked for."""
    for name in ("no_proxy", "NO_PROXY", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with Stub(always(403, b"blocked by policy")) as stub:
        monkeypatch.setenv("http_proxy", stub.url)
        http_client._opener.cache_clear()
        yield stub
    http_client._opener.cache_clear()


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "LOCALHOST", "127.0.0.2", "0.0.0.0"])
def test_a_server_on_this_machine_is_asked_without_the_proxy(proxy, host):
    with Stub(always(200, b"here")) as stub:
        stub_url = stub.url.replace("127.0.0.1", host)
        if host == "127.0.0.2":  # nobody listens there, but the proxy is not asked either
            refused(http_client.request, stub_url, timeout=5)
        else:
            assert http_client.request(stub_url, b"", {"X-Secret": "s"}, timeout=5) == b"here"
    assert not proxy.seen


def test_other_servers_are_asked_through_the_proxy_and_the_error_says_so(proxy, monkeypatch):
    error = refused(http_client.request, "http://a.invalid:1/x", timeout=5)
    assert [path for _, path, _, _ in proxy.seen] == ["http://a.invalid:1/x"]
    assert "blocked by policy (through the proxy of the environment variable http_proxy" in str(
        error
    )
    assert "add a.invalid to no_proxy" in str(error)
    monkeypatch.setenv("no_proxy", "a.invalid")
    error = refused(http_client.request, "http://a.invalid:1/x", timeout=5)
    assert len(proxy.seen) == 1 and "proxy" not in str(error)


@pytest.mark.parametrize(
    "url, local",
    [
        ("http://[::1]:80/v1", True),
        ("http://[::ffff:127.0.0.1]", True),
        ("http://judge.localhost", True),
        ("http://localhost.", True),
        ("http://localhost.example.org", False),
        ("http://127.0.0.1.example.org", False),
        ("http://10.0.0.1:80", False),
        ("http://[fe80::1]", False),
    ],
)
def test_which_addresses_are_this_machine(url, local):
    assert http_client.is_local(url) == local


def test_nobody_there():
    assert type(refused(http_client.request, nobody(), timeout=60)) is http_client.Unreachable


def test_a_server_that_does_not_answer_in_time():
    given_up = threading.Event()  # until then the server holds its answer back

    def answer(request, _):
        assert given_up.wait(60)
        return 200, b"late"

    with Stub(answer) as stub:
        error = refused(http_client.request, stub.url, timeout=0.2)
        given_up.set()
    assert type(error) is http_client.Unreachable and "timed out" in str(error)


def test_an_answer_that_trickles_does_not_get_round_the_time_limit():
    def answer(request, _):
        request.send_response(200)
        request.send_header("Content-Length", "100000")
        request.end_headers()
        while not given_up.wait(0.03):
            request.wfile.write(b"x")

    given_up = threading.Event()
    with Stub(answer) as stub:
        error = refused(http_client.request, stub.url, timeout=0.3)
        given_up.set()
    assert type(error) is http_client.Unreachable and "did not end" in str(error)


def test_an_answer_that_breaks_off():
    def answer(request, _):
        request.send_response(200)
        request.send_header("Content-Length", "100")
        request.end_headers()
        request.wfile.write(b"a half")
        request.close_connection = True

    with Stub(answer) as stub:
        error = refused(http_client.request, stub.url, timeout=5)
    assert type(error) is http_client.Unreachable and "broke off" in str(error)


def test_an_answer_that_is_too_long():
    with Stub(always(200, b"x" * 101)) as stub:
        assert len(http_client.request(stub.url, timeout=5, limit=101)) == 101
        error = refused(http_client.request, stub.url, timeout=5, limit=100)
    assert type(error) is http_client.Refused


def test_a_redirect_does_not_carry_the_secret_away():
    with Stub(always(200, b"thanks")) as thief:
        redirect = lambda request, _: request.reply(302, Location=thief.url)  # noqa: E731
        with Stub(redirect) as stub:
            error = refused(
                http_client.request, stub.url, headers={"Authorization": "s"}, timeout=5
            )
    assert type(error) is http_client.Refused and not thief.seen


# ---------------------------------------------------------------------------------- replicas


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


def test_the_secret_comes_from_the_environment(monkeypatch):
    monkeypatch.setenv("REWARD_SECRET", "s3cret")
    assert http_client.bearer("secret_env", "REWARD_SECRET") == {"Authorization": "Bearer s3cret"}
    assert http_client.bearer("secret_env", None) == {}
    monkeypatch.delenv("REWARD_SECRET")
    with pytest.raises(ValueError, match=r"secret_env='REWARD_SECRET'.*is empty"):
        http_client.bearer("secret_env", "REWARD_SECRET")


@pytest.mark.parametrize("value", ["s3cret\n", " s3cret", "s3\ncret", "s\u00e9cret"])
def test_a_secret_that_no_header_can_carry_is_an_error_that_does_not_show_it(monkeypatch, value):
    monkeypatch.setenv("REWARD_SECRET", value)
    with pytest.raises(ValueError, match="REWARD_SECRET has white space at an end") as error:
        http_client.bearer("secret_env", "REWARD_SECRET")
    assert "cret" not in str(error.value).replace("secret_env", "")
