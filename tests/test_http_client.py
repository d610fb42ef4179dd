"""Requests with a time limit and a secret, against real servers that misbehave."""

import threading

import pytest
from http_stub import Stub, always, nobody, refused

from flowgrpo_jax.transport import http_client


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
