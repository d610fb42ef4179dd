"""A real HTTP server in a thread, whose answers a test decides."""

import contextlib
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from flowgrpo_jax.transport import http_client


class Stub:
    """`answer(request, body)` returns (status, bytes), or None if it has written the answer itself.

    `seen` holds every request as (method, path, headers, body); `most` is how many were answered
    at a time.
    """

    def __init__(self, answer):
        self.answer, self.seen, self.most, self._now = answer, [], 0, 0
        lock, stub = threading.Lock(), self

        class Handler(BaseHTTPRequestHandler):
            def handle_any(self):
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                with lock:
                    stub.seen.append((self.command, self.path, dict(self.headers), body))
                    stub._now += 1
                    stub.most = max(stub.most, stub._now)
                try:
                    with contextlib.suppress(OSError):  # the client may have gone
                        if (reply := stub.answer(self, body)) is not None:
                            self.reply(*reply)
                finally:
                    with lock:
                        stub._now -= 1

            do_GET = do_POST = handle_any

            def reply(self, status, body=b"", **headers):
                self.send_response(status)
                for name, value in {"Content-Length": str(len(body)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_):
                """Not to the test's output."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()


def free_port():
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def nobody():
    """An address where no server is."""
    return f"http://127.0.0.1:{free_port()}"


def always(status, body=b""):
    return lambda request, _: (status, body)


def refused(f, *arguments, **options):
    """What f raised: Failed or one of its kinds."""
    with pytest.raises(http_client.Failed) as caught:
        f(*arguments, **options)
    return caught.value
