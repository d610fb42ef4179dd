"""Requests to servers: a time limit for each, bounded retries with back-off, several replicas.

Plain `urllib`: the requests are few and large, so that a connection for each costs nothing. Its
proxies are those of `http_proxy`, `https_proxy` and `no_proxy`, but a server on this machine is
always reached directly: a proxy cannot reach it, and would see the secret and the pictures.
"""

from __future__ import annotations

import functools
import http.client
import ipaddress
import itertools
import logging
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from typing import Any

log = logging.getLogger(__name__)

RETRIED = {408, 425, 429}  # these and 5xx: the same request may succeed later
RESTS = 10.0  # times what it cost to find out: a hung replica takes a tenth of the time at most
PATIENCE = 120.0  # seconds for which servers may load before a run


class Failed(Exception):
    """A request came to nothing. The message says where and why."""


class Unavailable(Failed):
    """The server answered that it cannot: busy, starting, or broken. Worth another try."""


class Unreachable(Unavailable):
    """No answer within the time limit, or no server. Worth another try, elsewhere first."""


class Refused(Failed):
    """The server will not have this request, whoever sends it again."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        """A redirect would carry the secret to a server that nobody named."""


@functools.cache
def _opener(direct: bool) -> urllib.request.OpenerDirector:
    """An opener that asks no proxy, or the proxies of the environment."""
    proxies = urllib.request.ProxyHandler({} if direct else None)
    return urllib.request.build_opener(_NoRedirect, proxies)


def is_local(url: str) -> bool:
    """Whether the host of an address is this machine: localhost, 127.0.0.0/8, ::1 or 0.0.0.0."""
    host = (urllib.parse.urlsplit(url).hostname or "").rstrip(".")
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:  # it is a name
        return False
    address = getattr(address, "ipv4_mapped", None) or address
    return address.is_loopback or address.is_unspecified


def _route(url: str) -> str:
    """Return what an error says about the proxy that a request took, "" if there was none."""
    parts = urllib.parse.urlsplit(url)
    proxies, host = urllib.request.getproxies(), parts.hostname or ""
    if is_local(url) or parts.scheme not in proxies or urllib.request.proxy_bypass(host):
        return ""
    return (
        f" (through the proxy of the environment variable {parts.scheme}_proxy; to ask the server"
        f" directly, add {host} to no_proxy)"
    )


def request(
    url: str,
    body: bytes | None = None,
    headers: Mapping[str, str] | None = None,
    *,
    timeout: float,
    limit: int = 64 << 20,
) -> bytes:
    """The answer to a GET, or to a POST where there is a body.

    Args:
      timeout: seconds for the whole of it, from the connection to the last byte.
      limit: the longest answer that is read, in bytes.

    Raises Unreachable, Unavailable or Refused.
    """
    deadline = time.monotonic() + timeout
    call = urllib.request.Request(url, data=body, headers=dict(headers or {}))
    try:
        with _opener(is_local(url)).open(call, timeout=timeout) as answer:
            return _read(url, answer, deadline, limit)
    except urllib.error.HTTPError as error:
        kind = Unavailable if error.code in RETRIED or error.code >= 500 else Refused
        reason = f"{url} answered {error.code}: {_reason(error)}{_route(url)}"
        raise kind(reason) from error
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or repr(error)
        raise Unreachable(f"{url}: {reason}{_route(url)}") from error


def _read(url: str, answer: Any, deadline: float, limit: int) -> bytes:
    """Read an answer to its end, or to the time limit if the server sends it slowly."""
    parts, size = [], 0
    while part := answer.read1(1 << 20):
        size += len(part)
        if size > limit:
            raise Refused(f"{url} answered with more than {limit} bytes")
        if time.monotonic() > deadline:
            raise Unreachable(f"{url}: the answer did not end within the time limit")
        parts.append(part)
    if answer.length:  # what the server promised and did not send
        raise Unreachable(f"{url}: the connection broke off in the answer")
    return b"".join(parts)


def _reason(error: urllib.error.HTTPError) -> str:
    try:
        text = error.read(500).decode("utf-8", "replace").strip()
    except (OSError, http.client.HTTPException):
        text = ""
    return text or str(error.reason)


def secret(option: str, variable: str) -> str:
    """Return the secret in an environment variable. Errors do not show the secret."""
    value = os.environ.get(variable, "")
    if not value:
        raise ValueError(
            f"{option}={variable!r}: the environment variable {variable} is empty; set it to the"
            " secret"
        )
    if value != value.strip() or not value.isprintable() or not value.isascii():
        raise ValueError(
            f"{option}={variable!r}: the environment variable {variable} has white space at an end,"
            " a line break or a letter that is not ASCII, which no HTTP header can carry"
        )
    return value


def bearer(option: str, variable: str | None) -> dict[str, str]:
    """The header with the secret that an environment variable holds; none for None."""
    return {} if variable is None else {"Authorization": f"Bearer {secret(option, variable)}"}


class Replicas:
    """A service at one or more addresses. Requests go first to each address in turn."""

    def __init__(
        self,
        urls: str | Sequence[str],
        *,
        timeout: float = 60.0,
        retries: int = 3,
        backoff: float = 0.5,
        rest: float = 10.0,
        headers: Mapping[str, str] | None = None,
    ):
        """
        Args:
          urls: addresses without the path, http:// or https://.
          timeout: seconds for one request.
          retries: rounds over all replicas after the first one.
          backoff: seconds before the second round; doubled for each that follows.
          rest: seconds for which nobody is asked when all were given up; then the next request
            tries again. A replica that was not reached is asked last for as long, or for RESTS
            times the seconds that this took, if that is longer; 0: it does not rest.
        """
        self.urls = [url.rstrip("/") for url in ([urls] if isinstance(urls, str) else urls)]
        if not self.urls:
            raise ValueError("urls is empty: give the address of at least one server")
        for url in self.urls:
            if not url.startswith(("http://", "https://")):
                raise ValueError(f"urls: {url!r} must start with http:// or https://")
        if timeout <= 0 or retries < 0 or backoff < 0 or rest < 0:
            raise ValueError(
                f"timeout={timeout} must be above 0 and retries={retries}, backoff={backoff},"
                f" rest={rest} not below"
            )
        self.timeout, self.retries, self.backoff, self.rest = timeout, retries, backoff, rest
        self.headers = dict(headers or {})
        self._turns = itertools.count()
        self._resting: dict[str, float] = {}  # url -> the time when its rest ends
        self._given_up = 0.0  # until then nobody is asked
        self._why = ""  # the reason why all were given up

    def post(self, path: str, body: bytes, content_type: str = "application/json") -> bytes:
        """The first good answer.

        Raises Refused at once, and Failed after (retries + 1) tries at every replica.
        """
        if time.monotonic() < self._given_up:
            raise Unreachable(f"{', '.join(self.urls)}: given up a moment ago: {self._why}")
        turn = next(self._turns) % len(self.urls)
        last: Unavailable | None = None
        for round_ in range(self.retries + 1):
            if round_:
                time.sleep(self.backoff * 2 ** (round_ - 1))
            for url in self._order(turn):
                try:
                    return self._post(url, path, body, content_type)
                except Unavailable as error:
                    last = error
                    log.debug("%s; round %d of %d", error, round_ + 1, self.retries + 1)
        if isinstance(last, Unreachable):
            self._given_up, self._why = time.monotonic() + self.rest, str(last)
        raise Unavailable(f"given up after {self.retries + 1} tries, the last: {last}") from last

    def _order(self, turn: int) -> list[str]:
        """Return the replicas, starting with the one of this turn; those that rest come last."""
        now = time.monotonic()
        rotated = self.urls[turn:] + self.urls[:turn]
        return sorted(rotated, key=lambda url: self._resting.get(url, 0.0) > now)

    def _post(self, url: str, path: str, body: bytes, content_type: str) -> bytes:
        headers = self.headers | {"Content-Type": content_type}
        begun = time.monotonic()
        try:
            answer = request(url + path, body, headers, timeout=self.timeout)
        except Unreachable as error:
            now = time.monotonic()
            if url not in self._resting:
                log.warning("%s; it is asked last until it answers", error)
            self._resting[url] = now + (self.rest and max(self.rest, RESTS * (now - begun)))
            raise
        if self._resting.pop(url, None):
            log.warning("%s is back", url)
        self._given_up = 0.0
        return answer

    def check(self, what: str, probe: Callable[[str], None]) -> None:
        """Try `probe` on every replica, and log a warning for each that fails.

        Replicas that may still be starting are tried again for PATIENCE seconds if none is ready.

        Raises RuntimeError when all of them fail: it names each and its reason.
        """
        deadline = time.monotonic() + PATIENCE
        while True:
            failures = []
            for url in self.urls:
                try:
                    probe(url)
                except Failed as error:
                    failures.append(error)
                    log.warning("%s: %s", what, error)
            if len(failures) < len(self.urls):
                return
            lasting = not all(isinstance(error, Unavailable) for error in failures)
            if lasting or time.monotonic() > deadline:
                reasons = "; ".join(map(str, failures))
                raise RuntimeError(f"{what}: no server is ready. {reasons}")
            time.sleep(min(5.0, PATIENCE))
